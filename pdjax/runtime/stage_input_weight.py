"""The backward pass of one stage in two parts, as jitted functions placed on its devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from jax.sharding import Sharding

from pdjax.runtime.inputs import Given, StageInputs, restricted, shapes
from pdjax.split.differentiate import StagePrograms
from pdjax.split.input_weight import split_input_weight
from pdjax.trace.jit import Values, accumulate, jit_on


class Held(NamedTuple):
    """What waits for the weight part of a microbatch.

    Attributes:
        given: what it reads of what the backward pass was given.
        values: what it reads of what the forward pass saved, and what the input part held for it.
    """

    given: Given
    values: Values


class DividedRunner:
    """The compiled input part and weight part of one stage. Calling one only dispatches it.

    The gradients of a stage are a tuple in the order of its parameters, None before any; either
    part adds to those that it makes, which are donated, and hands the others on. Until both have
    run once, None stands for a gradient that there is not yet.

    Attributes:
        backward: the programs.
    """

    def __init__(self, programs: StagePrograms, inputs: StageInputs, placement: Sharding) -> None:
        self.backward = split_input_weight(programs)
        self._inputs = inputs
        self._reads = inputs.reads(programs.backward)
        self._weight_reads = inputs.reads(self.backward.weight_part)
        self._saved = programs.forward.outputs["saved"]
        outputs = self.backward.input_part.outputs
        # A cotangent that is sent back may be held as well; it is returned once.
        sent = {id(atom): at for at, atom in enumerate(outputs["receives"])}
        self._sent_and_held = tuple(sent.get(id(var)) for var in outputs["held"])
        self._input_part = jit_on(self._run_input_part, placement, donate=(4,))
        self._weight_part = jit_on(self._run_weight_part, placement, donate=(2,))

    def input_part(
        self,
        weights: Values,
        given: Given,
        saved: Values,
        cotangents: Values,
        gradients: Values | None,
    ) -> tuple[Values | None, Values, Held]:
        """Makes the cotangents for what the stage received.

        Args:
            weights: the version of the weights that the forward pass read.
            given: what the whole backward pass reads.
            saved: what the forward pass saved.
            cotangents: for each value that gets a cotangent back a tuple of those that came.
            gradients: the sums so far.

        Returns:
            The sums of the gradients, the cotangents, and what the weight part must be given. The
            last refers to arrays of `saved` and of the cotangents, so donate none of these.
        """
        early = self.backward.early
        sums, sent, more = self._input_part(
            weights, given, saved, cotangents, _chosen(gradients, early)
        )
        rest = iter(more)
        held = (next(rest) if at is None else sent[at] for at in self._sent_and_held)
        kept = (saved[at] for at in self.backward.kept)
        return (
            self._with(gradients, early, sums),
            sent,
            Held(restricted(given, self._weight_reads), (*kept, *held)),
        )

    def weight_part(self, weights: Values, held: Held, gradients: Values | None) -> Values | None:
        """Makes the gradients that are not made yet; runs nothing if there are none.

        Args:
            weights: the version of the weights that the forward pass read.
            held: what the input part returned for it.
            gradients: the sums so far.

        Returns:
            The sums of the gradients.
        """
        late = self.backward.late
        if not late:
            return gradients
        sums = self._weight_part(weights, held, _chosen(gradients, late))
        return self._with(gradients, late, sums)

    def lowerings(self, kind: str, key: Any, accumulates: bool) -> Iterator[Callable[[], Any]]:
        """Functions that lower a part for its first and, if it accumulates, further microbatches.

        Args:
            kind: ``"I"`` or ``"W"``.
            key: the shape of the base key.
            accumulates: whether a minibatch has more than one microbatch.
        """
        weights, saved = self._inputs.shapes("params"), shapes(self._saved)
        positions = self.backward.early if kind == "I" else self.backward.late
        given = self._inputs.given_shapes(self._reads, key)
        totals = [_chosen(None, positions)]
        totals += [_chosen(weights, positions)] if accumulates and positions else []
        for sums in totals if kind == "I" else ():
            cotangents = self._inputs.cotangent_shapes()
            yield partial(self._input_part.lower, weights, given, saved, cotangents, sums)
        for sums in totals if kind == "W" and positions else ():
            kept = [saved[at] for at in self.backward.kept]
            values = (*kept, *shapes(self.backward.input_part.outputs["held"]))
            held = Held(restricted(given, self._weight_reads), values)
            yield partial(self._weight_part.lower, weights, held, sums)

    def _run_input_part(
        self,
        weights: Values,
        given: Given,
        saved: Values,
        cotangents: Values,
        sums: Values | None,
    ) -> tuple[Values, Values, Values]:
        values = self._inputs.values(weights, given) | self._inputs.saved(saved)
        values |= self._inputs.cotangents(cotangents) | self._inputs.seed()
        made = self.backward.input_part.run(values)
        pairs = zip(made["held"], self._sent_and_held, strict=True)
        more = tuple(value for value, at in pairs if at is None)
        return accumulate(sums, made["params"]), made["receives"], more

    def _run_weight_part(self, weights: Values, held: Held, sums: Values | None) -> Values:
        kept = [self._saved[at] for at in self.backward.kept]
        names = [*kept, *self.backward.input_part.outputs["held"]]
        values = self._inputs.values(weights, held.given)
        values |= zip(names, held.values, strict=True)
        made = self.backward.weight_part.run(values | self._inputs.seed())
        return accumulate(sums, made["params"])

    def _with(self, gradients: Values | None, positions: Sequence[int], new: Values) -> Values:
        """`gradients` with `new` ones at some positions."""
        count = len(self.backward.early) + len(self.backward.late)
        all_of_them = [None] * count if gradients is None else list(gradients)
        for at, value in zip(positions, new, strict=True):
            all_of_them[at] = value
        return tuple(all_of_them)


def _chosen(gradients: Values | None, positions: Sequence[int]) -> Values | None:
    """The gradients at some positions; None if they were not made yet."""
    if not positions:
        return ()
    if gradients is None or gradients[positions[0]] is None:
        return None
    return tuple(gradients[at] for at in positions)
