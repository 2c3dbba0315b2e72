"""The passes of one stage as jitted functions, placed on its devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from pdjax.differentiate import StagePrograms
from pdjax.jaxprs import Atom, Var
from pdjax.program import Program
from pdjax.runtime.placed import Values, placed
from pdjax.runtime.update import UpdateRunner


class Given(NamedTuple):
    """What a pass reads besides weights and activations; what it does not read is left empty.

    Attributes:
        consts: the arrays that the loss function closed over.
        state: the mutable state.
        batch: the batch leaves of the whole minibatch.
        key: the base key.
        number: the global number of the microbatch.
    """

    consts: Values = ()
    state: Values = ()
    batch: Values = ()
    key: Values = ()
    number: Values = ()


class Reads(NamedTuple):
    """Which groups of `Given` a pass reads. The others are left empty, so that nobody keeps them
    alive."""

    consts: bool
    state: bool
    batch: bool
    key: bool
    number: bool

    def pick(self, given: Given) -> Given:
        """Leaves out of `given` what is not read."""
        return Given(*(group if read else () for group, read in zip(given, self, strict=True)))


@dataclass(frozen=True)
class Slicing:
    """How a microbatch is cut out of a minibatch.

    Attributes:
        num_microbatches: microbatches in a minibatch.
        axes: for each batch leaf its batch axis, or None if every microbatch gets it whole.
    """

    num_microbatches: int
    axes: tuple[int | None, ...]

    def take(self, leaf: Any, index: int, number: Values) -> Any:
        """The part of the batch leaf `index` that belongs to microbatch `number`."""
        axis = self.axes[index]
        if axis is None or self.num_microbatches == 1:
            return leaf
        size = leaf.shape[axis] // self.num_microbatches
        start = (number[0] % self.num_microbatches).astype(jnp.int32) * size
        return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis)


class StageRunner:
    """The compiled passes of one stage. Calling one only dispatches it.

    ``forward(weights, given, received)`` returns its outputs in the order of `forward_outputs`.
    ``backward(weights, given, saved, cotangents, gradients)`` takes for each value that gets a
    cotangent back a tuple of those that came, adds its gradients to `gradients` (donated; None to
    begin), and returns them with the cotangents for the values it received.
    ``fused(weights, given, received, gradients)`` does both and returns
    ``(outputs, gradients, cotangents)``. ``whole(weights, given, received, optimizer_state)`` does
    the update, too, and returns ``(outputs, weights, optimizer_state, cotangents)``.
    """

    def __init__(
        self,
        programs: StagePrograms,
        placement: Sharding,
        slicing: Slicing,
        update: UpdateRunner,
    ) -> None:
        self.programs = programs
        self.placement = placement
        self.slicing = slicing
        self.forward_outputs = OutputIndex(programs.forward)
        self.fused_outputs = OutputIndex(programs.fused)
        self.forward_reads = self._reads(programs.forward)
        self.backward_reads = self._reads(programs.backward)
        self.fused_reads = self._reads(programs.fused)
        self.forward = placed(self._forward, placement)
        self.backward = placed(self._backward, placement, donate=(4,))
        self.fused = placed(self._fused, placement, donate=(3,))
        self.update = update
        self.whole = placed(self._whole, placement, donate=(0, 3) if update.donates_weights else (3,))

    def lowerings(
        self, kind: str, batch: Sequence[Any], key: Any, accumulates: bool
    ) -> Iterator[Callable[[], Any]]:
        """Functions that lower a pass for its first and, if it accumulates, further microbatches.

        Args:
            kind: ``"F"``, ``"B"``, ``"FB"`` or ``"FBU"``; any other kind has no program here.
            batch: the shape of each batch leaf of a minibatch.
            key: the shape of the base key.
            accumulates: whether a minibatch has more than one microbatch.
        """
        shapes = {name: _shapes(group) for name, group in self.programs.inputs.items()}
        weights = shapes["params"]
        leaves = tuple(batch[i] for i in self.programs.stage.batch)
        number = jax.ShapeDtypeStruct((), jnp.uint32)
        given = Given(shapes["consts"], shapes["state"], leaves, (key,), (number,))
        totals = (None, weights) if accumulates else (None,)
        if kind == "F":
            reads = self.forward_reads.pick(given)
            yield partial(self.forward.lower, weights, reads, shapes["receives"])
        for total in totals if kind == "FB" else ():
            reads = self.fused_reads.pick(given)
            yield partial(self.fused.lower, weights, reads, shapes["receives"], total)
        if kind == "FBU":
            reads = self.fused_reads.pick(given)
            state = self.update.state_shapes
            yield partial(self.whole.lower, weights, reads, shapes["receives"], state)
        for total in totals if kind == "B" else ():
            reads = self.backward_reads.pick(given)
            saved = _shapes(self.programs.forward.outputs["saved"])
            cotangents = tuple(
                _shapes([var]) * len(self.programs.stage.targets[at])
                for var, at in zip(
                    self.programs.cotangents, self.programs.gradient_sends, strict=True
                )
            )
            yield partial(self.backward.lower, weights, reads, saved, cotangents, total)

    def _reads(self, program: Program) -> Reads:
        read = set(program.reads)
        groups = {name: bool(read & set(group)) for name, group in self.programs.inputs.items()}
        sliced = groups["batch"] and self.slicing.num_microbatches > 1
        return Reads(
            consts=groups["consts"],
            state=groups["state"],
            batch=groups["batch"],
            key=groups["key"],
            number=groups["key"] or sliced,
        )

    def _values(self, weights: Values, given: Given) -> dict[Var, Any]:
        """The values of the stage's inputs other than those it receives."""
        inputs = self.programs.inputs
        values = dict(zip(inputs["params"], weights, strict=True))
        if given.consts:
            values |= zip(inputs["consts"], given.consts, strict=True)
        if given.state:
            values |= zip(inputs["state"], given.state, strict=True)
        if given.batch:
            indices = self.programs.stage.batch
            for var, leaf, index in zip(inputs["batch"], given.batch, indices, strict=True):
                values[var] = self.slicing.take(leaf, index, given.number)
        if given.key:
            values[inputs["key"][0]] = jax.random.fold_in(given.key[0], given.number[0])
        return values

    def _forward(self, weights: Values, given: Given, received: Values) -> Values:
        values = self._values(weights, given)
        values |= zip(self.programs.inputs["receives"], received, strict=True)
        return self.forward_outputs.distinct(self.programs.forward.run(values))

    def _backward(
        self,
        weights: Values,
        given: Given,
        saved: Values,
        cotangents: Values,
        gradients: Values | None,
    ) -> tuple[Values, Values]:
        programs = self.programs
        values = self._values(weights, given)
        values |= zip(programs.forward.outputs["saved"], saved, strict=True)
        values |= zip(programs.cotangents, map(_total, cotangents), strict=True)
        made = programs.backward.run(values | self._seed())
        return _accumulate(gradients, made["params"]), made["receives"]

    def _fused(
        self, weights: Values, given: Given, received: Values, gradients: Values | None
    ) -> tuple[Values, Values, Values]:
        values = self._values(weights, given)
        values |= zip(self.programs.inputs["receives"], received, strict=True)
        made = self.programs.fused.run(values | self._seed())
        outputs = self.fused_outputs.distinct(made)
        return outputs, _accumulate(gradients, made["params"]), made["receives"]

    def _whole(
        self, weights: Values, given: Given, received: Values, optimizer_state: Values
    ) -> tuple[Values, Values, Values, Values]:
        outputs, gradients, cotangents = self._fused(weights, given, received, None)
        weights, optimizer_state = self.update.whole(weights, optimizer_state, gradients)
        return outputs, weights, optimizer_state, cotangents

    def _seed(self) -> dict[Var, Any]:
        seed = self.programs.seed
        return {} if seed is None else {seed: jnp.ones((), seed.aval.dtype)}


class OutputIndex:
    """Where each group of a forward pass's outputs stands among its distinct outputs.

    A value may be sent, be a result and be saved all at once; it is returned once.
    """

    def __init__(self, program: Program) -> None:
        self._atoms: list[Atom] = []
        self.sends = self._add(program.outputs["sends"])
        self.state = self._add(program.outputs["state"])
        self.results = self._add(program.outputs["results"])
        self.saved = self._add(program.outputs.get("saved", ()))

    def _add(self, group: Sequence[Atom]) -> tuple[int, ...]:
        known = {id(atom): at for at, atom in enumerate(self._atoms)}
        for atom in group:
            if id(atom) not in known:
                known[id(atom)] = len(self._atoms)
                self._atoms.append(atom)
        return tuple(known[id(atom)] for atom in group)

    def distinct(self, made: dict[str, Values]) -> Values:
        """The values of a run, each once."""
        found: dict[int, Any] = {}
        for name in ("sends", "state", "results", "saved"):
            found |= zip(getattr(self, name), made.get(name, ()), strict=True)
        return tuple(found[at] for at in range(len(found)))


def _shapes(group: Sequence[Atom]) -> Values:
    return tuple(jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in group)


def _total(parts: Sequence[Any]) -> Any:
    """The sum of the cotangents that several stages send back for one value."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _accumulate(total: Values | None, new: Values) -> Values:
    if total is None:
        return new
    return tuple(old + more for old, more in zip(total, new, strict=True))
