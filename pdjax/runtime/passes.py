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
from pdjax.runtime.results import Merge, mean_of_results
from pdjax.runtime.stage import StageRunner
from pdjax.runtime.update import UpdateRunner
from pdjax.schedules import Schedule, dispatch_order
from pdjax.split import StageSplit
from pdjax.trees import place
from pdjax.weights import WeightRule

InstructionKind = Literal["F", "B", "I", "W", "FB", "U", "FBU"]
Fusion = Literal["", "FB", "FBU"]
"""The kinds of actions that a stage does in one program."""

Instruction = tuple[InstructionKind, int, int]
"""What to dispatch, for which stage, and for which microbatch counted from the step's first."""


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
        stages: the passes of each stage.
        routes: for each stage where its outputs go.
        instructions: what to dispatch in a step, in order.
        kinds: for each stage the kinds of its instructions.
        stash_bytes: for each stage what a microbatch keeps from its forward pass on.
        held_bytes: for each stage what it keeps between input part and weight part.
        consts: for each stage the closed-over arrays that it reads, in place.
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
        programs = differentiate(split, remat)
        self.stages = tuple(
            StageRunner(program, placement, update)
            for program, placement, update in zip(programs, placements, updates, strict=True)
        )
        self.routes = tuple(_find_routes(stage, programs) for stage in range(len(programs)))
        self.instructions = _fuse(schedule, self._longest_fusions(schedule, rule, updates))
        self.kinds: tuple[frozenset[InstructionKind], ...] = tuple(
            frozenset(kind for kind, stage, _ in self.instructions if stage == index)
            for index in range(len(programs))
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

        def fusion(stage: int) -> Fusion:
            if self.routes[stage].num_waits:
                return ""
            alone = updates[stage].num_phases == 1 and not self.weighted
            alone = alone and rule.forward == "newest"
            if alone and _always_follow(schedule, stage, "FBU"):
                return "FBU"
            return "FB" if _always_follow(schedule, stage, "FB") else ""

        return tuple(fusion(stage) for stage in range(len(self.stages)))

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
        used = {(kind, stage) for kind, stage, _ in self.instructions}
        accumulates = self.slicing.num_microbatches > 1
        for kind, stage in sorted(used):
            if kind == "U":
                yield from self.stages[stage].update.lowerings()
            else:
                yield from self.stages[stage].lowerings(kind, key, accumulates)


class PlacedConsts:
    """The arrays that loss functions closed over, each moved to a stage once.

    Args:
        placements: where the stages are.
    """

    def __init__(self, placements: Sequence[Sharding]) -> None:
        self._placements = placements
        self._placed: dict[tuple[int, int], tuple[Any, jax.Array]] = {}

    def of(self, split: StageSplit) -> tuple[Values, ...]:
        """For each stage the arrays that it reads, in place."""
        values = split.traced.program.consts
        return tuple(
            tuple(self._at(values[i], stage.index) for i in stage.consts) for stage in split.stages
        )

    def _at(self, value: Any, stage: int) -> jax.Array:
        key = id(value), stage
        if key not in self._placed:  # it holds the value, too, so that its id stays its own
            self._placed[key] = value, place(value, self._placements[stage])
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


def _fuse(schedule: Schedule, fusions: Sequence[Fusion]) -> tuple[Instruction, ...]:
    """The dispatch order, with one instruction in the place of the actions that a stage fuses."""
    instructions: list[Instruction] = []
    for action in dispatch_order(schedule):
        kinds = fusions[action.stage]
        if kinds and action.kind == "F":
            instructions.append((kinds, action.stage, action.microbatch))
        elif action.kind not in kinds:
            instructions.append((action.kind, action.stage, action.microbatch))
    return tuple(instructions)


def _always_follow(schedule: Schedule, stage: int, kinds: Fusion) -> bool:
    """Whether every forward pass of `stage` is directly followed by the others of `kinds`."""
    worker = schedule.workers[schedule.worker_of(stage)]

    def follow(at: int, microbatch: int) -> bool:
        found = worker[at : at + len(kinds)]
        same = all((a.stage, a.microbatch) == (stage, microbatch) for a in found)
        return same and "".join(a.kind for a in found) == kinds

    return all(
        follow(at, first.microbatch)
        for at, first in enumerate(worker)
        if first.kind == "F" and first.stage == stage
    )
