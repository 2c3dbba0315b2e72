"""The passes of one stage as jitted functions, placed on its devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
from jax.sharding import Sharding

from pdjax.runtime.inputs import Given, StageInputs, shapes
from pdjax.runtime.inputs import Reads as Reads
from pdjax.runtime.stage_input_weight import DividedRunner
from pdjax.runtime.update import UpdateRunner
from pdjax.split.differentiate import StagePrograms
from pdjax.trace.jaxprs import Atom
from pdjax.trace.jit import Values, accumulate, jit_on
from pdjax.trace.program import Program


class StageRunner:
    """The compiled passes of one stage. Calling one only dispatches it.

    ``forward(weights, given, received)`` returns its outputs in the order of `forward_outputs`.
    ``backward(weights, given, saved, cotangents, gradients)`` takes for each value that gets a
    cotangent back a tuple of those that came, adds its gradients to `gradients` (donated; None to
    begin), and returns them with the cotangents for the values it received.
    ``fused(weights, given, received, gradients)`` does both and returns
    ``(outputs, gradients, cotangents)``. ``whole(weights, given, received, optimizer_state)`` does
    the update, too, and returns ``(outputs, weights, optimizer_state, cotangents)``.
    ``divided`` has the backward pass in two parts.
    """

    def __init__(
        self,
        programs: StagePrograms,
        placement: Sharding,
        update: UpdateRunner,
    ) -> None:
        self.programs = programs
        self.inputs = StageInputs(programs)
        self.forward_outputs = OutputIndex(programs.forward)
        self.fused_outputs = OutputIndex(programs.fused)
        self.forward_reads = self.inputs.reads(programs.forward)
        self.backward_reads = self.inputs.reads(programs.backward)
        self.fused_reads = self.inputs.reads(programs.fused)
        self.forward = jit_on(self._forward, placement)
        self.backward = jit_on(self._backward, placement, donate=(4,))
        self.fused = jit_on(self._fused, placement, donate=(3,))
        self.update = update
        self.whole = jit_on(
            self._whole, placement, donate=(0, 3) if update.donates_weights else (3,)
        )
        self._placement = placement

    @cached_property
    def divided(self) -> DividedRunner:
        """The backward pass in two parts. It is divided when first asked for."""
        return DividedRunner(self.programs, self.inputs, self._placement)

    def lowerings(self, kind: str, key: Any, accumulates: bool) -> Iterator[Callable[[], Any]]:
        """Functions that lower a pass for its first and, if it accumulates, further microbatches.

        Args:
            kind: ``"F"``, ``"B"``, ``"I"``, ``"W"``, ``"FB"`` or ``"FBU"``; any other kind has no
                program here.
            key: the shape of the base key.
            accumulates: whether a minibatch has more than one microbatch.
        """
        weights, received = self.inputs.shapes("params"), self.inputs.shapes("receives")
        totals = (None, weights) if accumulates else (None,)
        if kind == "F":
            given = self.inputs.given_shapes(self.forward_reads, key)
            yield partial(self.forward.lower, weights, given, received)
        if kind == "B":
            given = self.inputs.given_shapes(self.backward_reads, key)
            saved = shapes(self.programs.forward.outputs["saved"])
            for total in totals:
                cotangents = self.inputs.cotangent_shapes()
                yield partial(self.backward.lower, weights, given, saved, cotangents, total)
        if kind in ("I", "W"):
            yield from self.divided.lowerings(kind, key, accumulates)
        fused = self.inputs.given_shapes(self.fused_reads, key)
        for total in totals if kind == "FB" else ():
            yield partial(self.fused.lower, weights, fused, received, total)
        if kind == "FBU":
            yield partial(self.whole.lower, weights, fused, received, self.update.state_shapes)

    def _forward(self, weights: Values, given: Given, received: Values) -> Values:
        values = self.inputs.values(weights, given) | self.inputs.received(received)
        return self.forward_outputs.distinct(self.programs.forward.run(values))

    def _backward(
        self,
        weights: Values,
        given: Given,
        saved: Values,
        cotangents: Values,
        gradients: Values | None,
    ) -> tuple[Values, Values]:
        values = self.inputs.values(weights, given) | self.inputs.saved(saved)
        values |= self.inputs.cotangents(cotangents) | self.inputs.seed()
        made = self.programs.backward.run(values)
        return accumulate(gradients, made["params"]), made["receives"]

    def _fused(
        self, weights: Values, given: Given, received: Values, gradients: Values | None
    ) -> tuple[Values, Values, Values]:
        values = self.inputs.values(weights, given) | self.inputs.received(received)
        made = self.programs.fused.run(values | self.inputs.seed())
        outputs = self.fused_outputs.distinct(made)
        return outputs, accumulate(gradients, made["params"]), made["receives"]

    def _whole(
        self, weights: Values, given: Given, received: Values, optimizer_state: Values
    ) -> tuple[Values, Values, Values, Values]:
        """For a minibatch of one microbatch: its gradients are divided by one."""
        outputs, gradients, cotangents = self._fused(weights, given, received, None)
        weights, optimizer_state = self.update.whole(weights, optimizer_state, gradients)
        return outputs, weights, optimizer_state, cotangents


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
        return tuple(_strong(found[at]) for at in range(len(found)))


def _strong(value: Any) -> Any:
    """A value of the type that is compiled for; numbers in the program make weak ones."""
    weak = getattr(value, "weak_type", False)
    return jax.lax.convert_element_type(value, value.dtype) if weak else value
