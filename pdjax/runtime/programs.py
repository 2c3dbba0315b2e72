"""All that is compiled for minibatches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import Sharding

from pdjax.runtime.metrics import Results
from pdjax.runtime.microbatches import Slicing
from pdjax.runtime.replica_map import Places
from pdjax.runtime.stage import StageRunner
from pdjax.runtime.update import UpdateRunner
from pdjax.schedules import Action, Schedule
from pdjax.schedules.dispatch import dispatch_phases
from pdjax.schedules.weight_rule import WeightRule
from pdjax.split.differentiate import Remat, StagePrograms, differentiate
from pdjax.split.stages import StageSplit
from pdjax.trace import jaxprs
from pdjax.trace.jaxprs import Var
from pdjax.trace.jit import Values
from pdjax.trees import place

InstructionKind = Literal["F", "B", "I", "W", "FB", "U", "FBU"]
Fusion = Literal["", "FB", "FBU"]
"""The kinds of actions that a stage does in one program."""

Instruction = tuple[InstructionKind, int, int]
"""What to dispatch, at which place, and for which microbatch counted from the step's first."""


@dataclass(frozen=True)
class Route:
    """What goes from one stage to another with every microbatch.

    Attributes:
        sources: for each value its position among those that the sender makes.
        targets: for each its position among those that the receiver waits for.
        shapes: their shapes.
        num_bytes: how much they are.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    shapes: Values
    num_bytes: int

    @classmethod
    def of(cls, triples: Sequence[tuple[int, int, Var]]) -> Route:
        """The route of values given by their two positions and their variable."""
        variables = [var for _, _, var in triples]
        return cls(
            tuple(here for here, _, _ in triples),
            tuple(there for _, there, _ in triples),
            tuple(map(jaxprs.shape_of, variables)),
            sum(map(jaxprs.num_bytes, variables)),
        )


@dataclass(frozen=True)
class Routes:
    """Where the outputs of a stage go, and where its cotangents come from.

    Attributes:
        forward: what goes to each later stage, of the values that this stage sends.
        backward: what goes back to each earlier stage, of the cotangents that this stage makes, to
            the values for which that stage waits for cotangents.
        results: the positions of the loss function's results that the stage makes.
        result_shapes: their shapes.
        num_waits: for how many values this stage waits for cotangents.
    """

    forward: dict[int, Route]
    backward: dict[int, Route]
    results: tuple[int, ...]
    result_shapes: Values
    num_waits: int

    @property
    def forward_bytes(self) -> dict[int, int]:
        """How much goes to each later stage, for each microbatch."""
        return {stage: route.num_bytes for stage, route in self.forward.items()}

    @property
    def backward_bytes(self) -> dict[int, int]:
        """How much goes back to each earlier stage."""
        return {stage: route.num_bytes for stage, route in self.backward.items()}


class Passes:
    """The compiled passes of all stages for minibatches of one shape.

    Attributes:
        split: the loss function, cut into stages.
        places: where the stages are.
        stages: the passes of each place.
        routes: for each stage where its outputs go.
        instructions: for each minibatch of a cycle what to dispatch in its step, in order; of
            places in other processes what concerns this one.
        kinds: for each place the kinds of its instructions.
        stash_bytes: for each place what a microbatch keeps from its forward pass on.
        held_bytes: for each place what it keeps between input part and weight part.
        consts: for each place the closed-over arrays that it reads, in place.
        slicing: how minibatches divide into microbatches.
        results: puts a minibatch's loss and metrics together.
    """

    def __init__(
        self,
        split: StageSplit,
        placements: Sequence[Sharding],
        schedule: Schedule,
        rule: WeightRule,
        slicing: Slicing,
        remat: Sequence[Remat],
        updates: Sequence[UpdateRunner],
        metric_axes: Sequence[int | None],
        consts: tuple[Values, ...],
        here: Sequence[bool],
    ) -> None:
        self.split = split
        self.results = Results(split, slicing.num_microbatches, metric_axes, placements[-1])
        self._here = here
        self.places = places = Places.of(schedule)
        programs = differentiate(split, remat)
        self.stages = tuple(
            StageRunner(programs[stage], placement, update)
            for stage, placement, update in zip(places.stage_of, placements, updates, strict=True)
        )
        self.routes = tuple(_find_routes(stage, programs) for stage in range(len(programs)))
        fusions = self._longest_fusions(schedule, rule, updates)
        instructions = _fuse(schedule, places, fusions)
        self.kinds: tuple[frozenset[InstructionKind], ...] = tuple(
            frozenset(kind for phase in instructions for kind, at, _ in phase if at == place)
            for place in range(len(self.stages))
        )
        self.instructions = tuple(
            tuple(each for each in phase if self._concerns(each[0], each[1], updates))
            for phase in instructions
        )
        self.stash_bytes = tuple(runner.programs.saved_bytes for runner in self.stages)
        self.held_bytes = tuple(
            runner.divided.backward.held_bytes if "I" in kinds else 0
            for runner, kinds in zip(self.stages, self.kinds, strict=True)
        )
        self.consts = consts
        self.slicing = slicing

    def _longest_fusions(
        self, schedule: Schedule, rule: WeightRule, updates: Sequence[UpdateRunner]
    ) -> tuple[Fusion, ...]:
        """What each stage does in one program.

        A forward and a backward pass that follow each other, where the stage waits for no
        cotangent in between; with the update if it needs nothing but these gradients, and is
        made to the weights that they were computed with.
        """

        def fusion(place: int) -> Fusion:
            stage, worker = self.places.stage_of[place], self.places.worker_of[place]
            if self.routes[stage].num_waits:
                return ""
            alone = updates[place].num_phases == 1 and not self.results.weighted
            alone = alone and rule.forward == "newest" and self.places.replicas[stage] == 1
            if alone and _always_follow(schedule.workers[worker], stage, "FBU"):
                return "FBU"
            return "FB" if _always_follow(schedule.workers[worker], stage, "FB") else ""

        return tuple(fusion(place) for place in range(len(self.stages)))

    def _concerns(self, kind: InstructionKind, place: int, updates: Sequence[UpdateRunner]) -> bool:
        """Whether this process runs an instruction, or gets something of it."""
        if self._here[place]:
            return True
        if kind == "W":
            return False
        stage = self.places.stage_of[place]
        # Before an update whose gradients have a weight all are told it, in one order.
        if kind == "U" and (updates[place].num_phases > 1 or self.results.weighted):
            return True
        routes = self.routes[stage]
        getting = [stage] if kind == "U" else [*routes.forward, *routes.backward]
        if routes.results and kind != "U":
            getting.append(len(self.routes) - 1)
        return any(self._here[at] for other in getting for at in self.places.of_stage(other))

    def lowerings(self, key: Any) -> Iterator[Callable[[], Any]]:
        """For each program that a step runs, a function that lowers it.

        Those that were compiled before are found again by `jax.jit`.

        Args:
            key: the shape of the base key.
        """
        accumulates = self.slicing.num_microbatches > 1
        for runner, kinds, here in zip(self.stages, self.kinds, self._here, strict=True):
            for kind in sorted(kinds) if here else ():
                if kind == "U":
                    yield from runner.update.lowerings()
                else:
                    yield from runner.lowerings(kind, key, accumulates)


class PlacedConsts:
    """The arrays that loss functions closed over, each moved to a place once.

    Args:
        placements: the places.
        here: for each of them whether it is in this process.
    """

    def __init__(self, placements: Sequence[Sharding], here: Sequence[bool]) -> None:
        self._placements = placements
        self._here = here
        self._placed: dict[tuple[int, int], tuple[Any, jax.Array]] = {}

    def of(self, split: StageSplit, places: Places) -> tuple[Values, ...]:
        """For each place of this process the arrays that its stage reads, there."""
        values = split.traced.program.consts
        return tuple(
            tuple(self._at(values[i], at) for i in split.stages[stage].consts if self._here[at])
            for at, stage in enumerate(places.stage_of)
        )

    def _at(self, value: Any, at: int) -> jax.Array:
        key = id(value), at
        if key not in self._placed:  # it holds the value, too, so that its id stays its own
            self._placed[key] = value, place(value, self._placements[at])
        return self._placed[key][1]


def _find_routes(stage: int, stages: Sequence[StagePrograms]) -> Routes:
    programs = stages[stage]
    forward: dict[int, list[tuple[int, int, Var]]] = {}
    for here, (var, targets) in enumerate(
        zip(programs.stage.sends, programs.stage.targets, strict=True)
    ):
        for target in targets:
            there = stages[target].stage.receives.index(var)
            forward.setdefault(target, []).append((here, there, var))
    backward: dict[int, list[tuple[int, int, Var]]] = {}
    for here, at in enumerate(programs.gradient_receives):
        var, source = programs.stage.receives[at], programs.stage.sources[at]
        maker = stages[source]
        there = maker.gradient_sends.index(maker.stage.sends.index(var))
        backward.setdefault(source, []).append((here, there, var))
    return Routes(
        {target: Route.of(found) for target, found in forward.items()},
        {source: Route.of(found) for source, found in backward.items()},
        programs.stage.outputs,
        tuple(map(jaxprs.shape_of, programs.forward.outputs["results"])),
        len(programs.gradient_sends),
    )


def _fuse(
    schedule: Schedule, places: Places, fusions: Sequence[Fusion]
) -> tuple[tuple[Instruction, ...], ...]:
    """The dispatch order, with one instruction in the place of the actions that a stage fuses."""
    phases = []
    for turns in dispatch_phases(schedule):
        instructions: list[Instruction] = []
        for worker, action in turns:
            place = places.at(worker, action.stage)
            kinds = fusions[place]
            if kinds and action.kind == "F":
                instructions.append((kinds, place, action.microbatch))
            elif action.kind not in kinds:
                instructions.append((action.kind, place, action.microbatch))
        phases.append(tuple(instructions))
    return tuple(phases)


def _always_follow(worker: Sequence[Action], stage: int, kinds: Fusion) -> bool:
    """Whether on a worker every forward pass of `stage` is directly followed by the others."""

    def follow(at: int, microbatch: int) -> bool:
        found = worker[at : at + len(kinds)]
        same = all((a.stage, a.microbatch) == (stage, microbatch) for a in found)
        return same and "".join(a.kind for a in found) == kinds

    return all(
        follow(at, first.microbatch)
        for at, first in enumerate(worker)
        if first.kind == "F" and first.stage == stage
    )
