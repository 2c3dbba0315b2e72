"""All that is compiled for minibatches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from pdjax import jaxprs
from pdjax.differentiate import Remat, StagePrograms, differentiate
from pdjax.jaxprs import Var
from pdjax.runtime.intake import Slicing
from pdjax.runtime.placed import Values
from pdjax.runtime.places import Places
from pdjax.runtime.results import Merge, mean_of_results
from pdjax.runtime.stage import StageRunner
from pdjax.runtime.update import UpdateRunner
from pdjax.schedules import Action, Schedule
from pdjax.schedules.phases import dispatch_phases
from pdjax.split import StageSplit
from pdjax.trees import place
from pdjax.weights import WeightRule

InstructionKind = Literal["F", "B", "I", "W", "FB", "U", "FBU"]
Fusion = Literal["", "FB", "FBU"]
"""The kinds of actions that a stage does in one program."""

Instruction = tuple[InstructionKind, int, int]
"""What to dispatch, at which place, and for which microbatch counted from the step's first."""


@dataclass(frozen=True)
class Routes:
    """Where the outputs of a stage go, and where its cotangents come from.

    Attributes:
        forward: for each later stage the pairs (position among the sends, position there).
        backward: for each earlier stage the pairs (position among the cotangents that this stage
            makes, position among the values for which that stage waits for cotangents).
        forward_bytes: how much goes to each later stage, for each microbatch.
        backward_bytes: how much goes back to each earlier stage.
        num_waits: for how many values this stage waits for cotangents.
    """

    forward: dict[int, tuple[tuple[int, int], ...]]
    backward: dict[int, tuple[tuple[int, int], ...]]
    forward_bytes: dict[int, int]
    backward_bytes: dict[int, int]
    num_waits: int


class Passes:
    """The compiled passes of all stages for minibatches of one shape.

    Attributes:
        split: the loss function, cut into stages.
        places: where the stages are.
        stages: the passes of each place.
        routes: for each stage where its outputs go.
        instructions: for each minibatch of a cycle what to dispatch in its step, in order.
        kinds: for each place the kinds of its instructions.
        stash_bytes: for each place what a microbatch keeps from its forward pass on.
        held_bytes: for each place what it keeps between input part and weight part.
        consts: for each place the closed-over arrays that it reads, in place.
        slicing: how minibatches divide into microbatches.
        num_results: number of the loss function's results (loss, weight, metrics).
        constants: those of the results that are known beforehand, by position.
        combine: makes a minibatch's results out of those of its microbatches.
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
    ) -> None:
        self.split = split
        self.places = places = Places.of(schedule)
        programs = differentiate(split, remat)
        self.stages = tuple(
            StageRunner(programs[stage], placement, update)
            for stage, placement, update in zip(places.stage_of, placements, updates, strict=True)
        )
        self.routes = tuple(_find_routes(stage, programs) for stage in range(len(programs)))
        fusions = self._longest_fusions(schedule, rule, updates)
        self.instructions = _fuse(schedule, places, fusions)
        self.kinds: tuple[frozenset[InstructionKind], ...] = tuple(
            frozenset(kind for phase in self.instructions for kind, at, _ in phase if at == place)
            for place in range(len(self.stages))
        )
        self.stash_bytes = tuple(runner.programs.saved_bytes for runner in self.stages)
        self.held_bytes = tuple(
            runner.divided.backward.held_bytes if "I" in kinds else 0
            for runner, kinds in zip(self.stages, self.kinds, strict=True)
        )
        self.consts = consts
        self.slicing = slicing
        self.num_results = len(split.results)
        self.constants = {
            at: jnp.asarray(atom.val, jaxprs.aval(atom).dtype)
            for at, atom in enumerate(split.results)
            if not isinstance(atom, Var)
        }
        merges: list[Merge] = ["combine" if axis is None else axis for axis in metric_axes]
        for at in self.constants:  # the first result, the loss, is none
            if at > self.weighted:
                merges[at - 1 - self.weighted] = "same"
        self.combine = mean_of_results(
            slicing.num_microbatches, self.weighted, merges, placements[-1]
        )

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
            alone = updates[place].num_phases == 1 and not self.weighted
            alone = alone and rule.forward == "newest" and self.places.replicas[stage] == 1
            if alone and _always_follow(schedule.workers[worker], stage, "FBU"):
                return "FBU"
            return "FB" if _always_follow(schedule.workers[worker], stage, "FB") else ""

        return tuple(fusion(place) for place in range(len(self.stages)))

    @property
    def weighted(self) -> bool:
        """Whether the loss has a weight."""
        return self.split.traced.weight is not None

    def lowerings(self, key: Any) -> Iterator[Callable[[], Any]]:
        """For each program that a step runs, a function that lowers it.

        Those that were compiled before are found again by `jax.jit`.

        Args:
            key: the shape of the base key.
        """
        accumulates = self.slicing.num_microbatches > 1
        for runner, kinds in zip(self.stages, self.kinds, strict=True):
            for kind in sorted(kinds):
                if kind == "U":
                    yield from runner.update.lowerings()
                else:
                    yield from runner.lowerings(kind, key, accumulates)


class PlacedConsts:
    """The arrays that loss functions closed over, each moved to a place once.

    Args:
        placements: the places.
    """

    def __init__(self, placements: Sequence[Sharding]) -> None:
        self._placements = placements
        self._placed: dict[tuple[int, int], tuple[Any, jax.Array]] = {}

    def of(self, split: StageSplit, places: Places) -> tuple[Values, ...]:
        """For each place the arrays that its stage reads, there."""
        values = split.traced.program.consts
        return tuple(
            tuple(self._at(values[i], at) for i in split.stages[stage].consts)
            for at, stage in enumerate(places.stage_of)
        )

    def _at(self, value: Any, at: int) -> jax.Array:
        key = id(value), at
        if key not in self._placed:  # it holds the value, too, so that its id stays its own
            self._placed[key] = value, place(value, self._placements[at])
        return self._placed[key][1]


def _find_routes(stage: int, stages: Sequence[StagePrograms]) -> Routes:
    programs = stages[stage]
    forward: dict[int, list[tuple[int, int]]] = {}
    for here, (var, targets) in enumerate(
        zip(programs.stage.sends, programs.stage.targets, strict=True)
    ):
        for target in targets:
            there = stages[target].stage.receives.index(var)
            forward.setdefault(target, []).append((here, there))
    backward: dict[int, list[tuple[int, int]]] = {}
    for here, at in enumerate(programs.gradient_receives):
        var, source = programs.stage.receives[at], programs.stage.sources[at]
        maker = stages[source]
        there = maker.gradient_sends.index(maker.stage.sends.index(var))
        backward.setdefault(source, []).append((here, there))
    sends = list(map(jaxprs.num_bytes, programs.stage.sends))
    receives = [jaxprs.num_bytes(programs.stage.receives[at]) for at in programs.gradient_receives]
    return Routes(
        {target: tuple(pairs) for target, pairs in forward.items()},
        {source: tuple(pairs) for source, pairs in backward.items()},
        {target: sum(sends[here] for here, _ in pairs) for target, pairs in forward.items()},
        {source: sum(receives[here] for here, _ in pairs) for source, pairs in backward.items()},
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
