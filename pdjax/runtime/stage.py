"""The passes of one stage as jitted functions, placed on its devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from pdjax import jaxprs
from pdjax.differentiate import StagePrograms
from pdjax.jaxprs import Atom
from pdjax.program import Program
from pdjax.runtime.placed import Values, placed, total
from pdjax.runtime.update import UpdateRunner


class Given(NamedTuple):
    """What a pass reads besides weights and activations; what it does not read is left empty.

    Attributes:
        consts: the arrays that the loss function closed over.
        state: the mutable state.
        batch: the batch leaves of the microbatch.
        key: the base key.
        number: the global number of the microbatch, if the key is read.
    """

    consts: Values = ()
    state: Values = ()
    batch: Values = ()
    key: Values = ()
    number: Values = ()


class Reads(NamedTuple):
    """Which groups of `Given` a pass reads.

    The others are left empty, so that nobody keeps them alive.
    """

    consts: bool
    state: bool
    batch: bool
    key: bool


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
        update: UpdateRunner,
    ) -> None:
        self.programs = programs
        self.forward_outputs = OutputIndex(programs.forward)
        self.fused_outputs = OutputIndex(programs.fused)
        self.forward_reads = self._reads(programs.forward)
        self.backward_reads = self._reads(programs.backward)
        self.fused_reads = self._reads(programs.fused)
        self.forward = placed(self._forward, placement)
        self.backward = placed(self._backward, placement, donate=(4,))
        self.fused = placed(self._fused, placement, donate=(3,))
        self.update = update
        self.whole = placed(
            self._whole, placement, donate=(0, 3) if update.donates_weights else (3,)
        )

    def lowerings(self, kind: str, key: Any, accumulates: bool) -> Iterator[Callable[[], Any]]:
        """Functions that lower a pass for its first and, if it accumulates, further microbatches.

        Args:
            kind: ``"F"``, ``"B"``, ``"FB"`` or ``"FBU"``; any other kind has no program here.
            key: the shape of the base key.
            accumulates: whether a minibatch has more than one microbatch.
        """
        shapes = {name: _shapes(group) for name, group in self.programs.inputs.items()}
        weights, received = shapes["params"], shapes["receives"]
        totals = (None, weights) if accumulates else (None,)
        if kind == "F":
            given = self._given_shapes(self.forward_reads, shapes, key)
            yield partial(self.forward.lower, weights, given, received)
        if kind == "B":
            given = self._given_shapes(self.backward_reads, shapes, key)
            saved = _shapes(self.programs.forward.outputs["saved"])
            for total in totals:
                cotangents = self._cotangent_shapes()
                yield partial(self.backward.lower, weights, given, saved, cotangents, total)
        fused = self._given_shapes(self.fused_reads, shapes, key)
        for total in totals if kind == "FB" else ():
            yield partial(self.fused.lower, weights, fused, received, total)
        if kind == "FBU":
            yield partial(self.whole.lower, weights, fused, received, self.update.state_shapes)

    def _given_shapes(self, reads: Reads, shapes: dict[str, Values], key: Any) -> Given:
        number = jax.ShapeDtypeStruct((), jnp.uint32)
        return Given(
            shapes["consts"] if reads.consts else (),
            shapes["state"] if reads.state else (),
            shapes["batch"] if reads.batch else (),
            (key,) if reads.key else (),
            (number,) if reads.key else (),
        )

    def _cotangent_shapes(self) -> Values:
        pairs = zip(self.programs.cotangents, self.programs.returners, strict=True)
        return tuple(_shapes([var]) * len(returners) for var, returners in pairs)

    def _reads(self, program: Program) -> Reads:
        read = set(program.reads)
        inputs = self.programs.inputs
        return Reads(**{name: not read.isdisjoint(inputs[name]) for name in Reads._fields})

    def _values(self, weights: Values, given: Given) -> dict[Atom, Any]:
        """The values of the stage's inputs other than those it receives."""
        inputs = self.programs.inputs
        values: dict[Atom, Any] = {}
        values |= zip(inputs["params"], weights, strict=True)
        if given.consts:
            values |= zip(inputs["consts"], given.consts, strict=True)
        if given.state:
            values |= zip(inputs["state"], given.state, strict=True)
        if given.batch:
            values |= zip(inputs["batch"], given.batch, strict=True)
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
        values |= zip(programs.cotangents, map(total, cotangents), strict=True)
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
        """For a minibatch of one microbatch: its gradients are divided by one."""
        outputs, gradients, cotangents = self._fused(weights, given, received, None)
        weights, optimizer_state = self.update.whole(weights, optimizer_state, gradients)
        return outputs, weights, optimizer_state, cotangents

    def _seed(self) -> dict[Atom, Any]:
        seed = self.programs.seed
        return {} if seed is None else {seed: jnp.ones((), jaxprs.aval(seed).dtype)}


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
    return tuple(map(jaxprs.shape_of, group))


def _accumulate(total: Values | None, new: Values) -> Values:
    if total is None:
        return new
    return tuple(old + more for old, more in zip(total, new, strict=True))
