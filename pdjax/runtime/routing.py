"""What goes from stage to stage with every microbatch, and how it gets into an inbox.

An *inbox* is a dict by microbatch. What a pass waits for has a number of slots there: of a forward
pass one for each value that the stage receives; of a backward pass one for each cotangent that
comes back, value after value, those of one value by the stage that sends them. Where one message
fills all slots in their order, which is the rule, the inbox holds its values as they came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from pdjax.split.differentiate import StagePrograms
from pdjax.split.stages import StageSplit
from pdjax.trace import jaxprs
from pdjax.trace.jaxprs import Atom, Var
from pdjax.trace.jit import Values

Pick = Callable[[Sequence[Any]], Values]
"""Takes some values, in some order, out of a sequence."""


def picker(positions: Sequence[int]) -> Pick:
    """The function that takes the values at some positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    if positions:
        return itemgetter(slice(positions[0], positions[0] + 1))
    return lambda _: ()


@dataclass(frozen=True)
class Route:
    """What goes from one stage to another with every microbatch.

    Attributes:
        sources: for each value its position among those that the sender makes.
        slots: for each its slot in the inbox of the receiver.
        shapes: their shapes.
        num_bytes: how much they are.
    """

    sources: tuple[int, ...]
    slots: tuple[int, ...]
    shapes: Values
    num_bytes: int

    @classmethod
    def of(cls, triples: Sequence[tuple[int, int, Atom]]) -> Route:
        """The route of values given by position, slot and variable."""
        variables = [var for _, _, var in triples]
        return cls(
            tuple(position for position, _, _ in triples),
            tuple(slot for _, slot, _ in triples),
            tuple(map(jaxprs.shape_of, variables)),
            sum(map(jaxprs.num_bytes, variables)),
        )


@dataclass(frozen=True)
class Routes:
    """Where the outputs of a stage go, and where its inputs come from.

    Attributes:
        forward: what goes to each later stage, of the values that this stage sends.
        backward: what goes back to each earlier stage, of the cotangents that this stage makes.
        results: of the loss function's results, those that the stage makes; the slots are their
            positions among all results.
        num_activations: how many values the stage receives.
        cotangents: for each value that gets cotangents back, how many stages send one.
    """

    forward: Mapping[int, Route]
    backward: Mapping[int, Route]
    results: Route
    num_activations: int
    cotangents: tuple[int, ...]

    @property
    def forward_bytes(self) -> tuple[tuple[int, int], ...]:
        """Pairs of a later stage and the bytes that go there with each microbatch."""
        return tuple(sorted((stage, route.num_bytes) for stage, route in self.forward.items()))

    @property
    def backward_bytes(self) -> tuple[tuple[int, int], ...]:
        """Pairs of an earlier stage and the bytes that go back there."""
        return tuple(sorted((stage, route.num_bytes) for stage, route in self.backward.items()))


def find_routes(split: StageSplit, programs: Sequence[StagePrograms]) -> tuple[Routes, ...]:
    """The routes of all stages, forward and backward."""
    return tuple(
        Routes(
            _forward(split, stage),
            _backward(stage, programs),
            _results(split, stage),
            len(split.stages[stage].receives),
            tuple(map(len, each.returners)),
        )
        for stage, each in enumerate(programs)
    )


def find_forward_routes(split: StageSplit) -> tuple[Routes, ...]:
    """The routes of all stages where there are no backward passes."""
    return tuple(
        Routes(_forward(split, at), {}, _results(split, at), len(stage.receives), ())
        for at, stage in enumerate(split.stages)
    )


def _forward(split: StageSplit, at: int) -> dict[int, Route]:
    stage = split.stages[at]
    found: dict[int, list[tuple[int, int, Var]]] = {}
    for position, (var, targets) in enumerate(zip(stage.sends, stage.targets, strict=True)):
        for target in targets:
            slot = split.stages[target].receives.index(var)
            found.setdefault(target, []).append((position, slot, var))
    return {target: Route.of(triples) for target, triples in found.items()}


def _backward(at: int, programs: Sequence[StagePrograms]) -> dict[int, Route]:
    stage, own = programs[at].stage, programs[at]
    found: dict[int, list[tuple[int, int, Var]]] = {}
    for position, received in enumerate(own.gradient_receives):
        var, source = stage.receives[received], stage.sources[received]
        maker = programs[source]
        value = maker.gradient_sends.index(maker.stage.sends.index(var))
        before = sum(map(len, maker.returners[:value]))
        slot = before + maker.returners[value].index(at)
        found.setdefault(source, []).append((position, slot, var))
    return {source: Route.of(triples) for source, triples in found.items()}


def _results(split: StageSplit, at: int) -> Route:
    outputs = split.stages[at].outputs
    return Route.of([(n, slot, split.results[slot]) for n, slot in enumerate(outputs)])


def put(
    inbox: dict[int, Any],
    microbatch: int,
    slots: Sequence[int] | None,
    num_slots: int,
    values: Values,
) -> None:
    """Puts values into their slots of an inbox; `slots` is None if they fill all, in order."""
    if slots is None:
        inbox[microbatch] = values
        return
    known = inbox.get(microbatch)
    if known is None:
        known = inbox[microbatch] = [None] * num_slots
    for slot, value in zip(slots, values, strict=True):
        known[slot] = value


def grouper(sizes: Sequence[int]) -> Callable[[Values], tuple[Values, ...]]:
    """The function that divides values into groups of some sizes, one after the other."""
    if not sizes:
        return lambda _: ()
    if set(sizes) == {1}:
        return lambda values: tuple(zip(values, strict=False))

    def group(values: Values) -> tuple[Values, ...]:
        each: Iterator[Any] = iter(values)
        return tuple(tuple(next(each) for _ in range(size)) for size in sizes)

    return group
