"""All that is compiled for minibatches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax.sharding import Sharding

from pdjax.differentiate import Remat, StagePrograms, differentiate
from pdjax.jaxprs import Var
from pdjax.runtime.results import mean_of_results
from pdjax.runtime.stage import Slicing, StageRunner, Values
from pdjax.schedules import Action, Schedule, dispatch_order
from pdjax.split import StageSplit
from pdjax.trees import place

InstructionKind = Literal["F", "B", "FB", "U"]
Instruction = tuple[InstructionKind, int, int]
"""What to dispatch, for which stage, and for which microbatch counted from the step's first."""


@dataclass(frozen=True)
class Routes:
    """Where the outputs of a stage go, and where its cotangents come from.

    Attributes:
        forward: for each later stage the pairs (position among the sends, position there).
        backward: for each earlier stage the pairs (position among the cotangents that this stage
            makes, position among the values for which that stage waits for cotangents).
        num_waits: for how many values this stage waits for cotangents.
    """

    forward: dict[int, tuple[tuple[int, int], ...]]
    backward: dict[int, tuple[tuple[int, int], ...]]
    num_waits: int


class Passes:
    """The compiled passes of all stages for minibatches of one shape.

    Attributes:
        split: the loss function, cut into stages.
        stages: the passes of each stage.
        routes: for each stage where its outputs go.
        instructions: what to dispatch in a step, in order.
        consts: for each stage the closed-over arrays that it reads, in place.
        num_results: number of the loss function's results (loss, weight, metrics).
        constants: those of the results that are known beforehand, by position.
        combine: makes a minibatch's results out of those of its microbatches.
    """

    def __init__(
        self,
        split: StageSplit,
        placements: Sequence[Sharding],
        schedule: Schedule,
        slicing: Slicing,
        remat: Sequence[Remat],
        metric_axes: Sequence[int | None],
    ) -> None:
        self.split = split
        programs = [
            differentiate(split, stage, how)
            for stage, how in zip(split.stages, remat, strict=True)
        ]
        self.stages = tuple(
            StageRunner(program, placement, slicing)
            for program, placement in zip(programs, placements, strict=True)
        )
        self.routes = tuple(_find_routes(stage, programs) for stage in range(len(programs)))
        self.instructions = _fuse(schedule, self.routes)
        self.consts = place_consts(split, placements)
        self.num_results = len(split.results)
        self.constants = {
            at: np.asarray(atom.val)
            for at, atom in enumerate(split.results)
            if not isinstance(atom, Var)
        }
        self.combine = mean_of_results(
            slicing.num_microbatches,
            split.traced.weight is not None,
            metric_axes,
            placements[-1],
        )

    @property
    def weighted(self) -> bool:
        """Whether the loss has a weight."""
        return self.split.traced.weight is not None

    def lowerings(self, batch: Sequence[Any], key: Any) -> Iterator[Callable[[], Any]]:
        """For each program that a step runs, a function that lowers it.

        Args:
            batch: the shape of each batch leaf of a minibatch.
            key: the shape of the base key.
        """
        used = {(kind, stage) for kind, stage, _ in self.instructions}
        accumulates = self.stages[0].slicing.num_microbatches > 1
        for kind, stage in sorted(used):
            yield from self.stages[stage].lowerings(kind, batch, key, accumulates)


def place_consts(split: StageSplit, placements: Sequence[Sharding]) -> tuple[Values, ...]:
    """For each stage the closed-over arrays that it reads, moved to where it is."""
    values = split.traced.program.consts
    return tuple(
        tuple(place(values[i], placement) for i in stage.consts)
        for stage, placement in zip(split.stages, placements, strict=True)
    )


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
    return Routes(
        {target: tuple(pairs) for target, pairs in forward.items()},
        {source: tuple(pairs) for source, pairs in backward.items()},
        len(programs.gradient_sends),
    )


def _always_adjacent(schedule: Schedule, stage: int) -> bool:
    """Whether every forward pass of `stage` is directly followed by its backward pass."""
    worker = schedule.workers[schedule.worker_of(stage)]
    forwards = [at for at, a in enumerate(worker) if a.kind == "F" and a.stage == stage]
    return all(
        worker[at + 1 : at + 2] == (Action("B", stage, worker[at].microbatch),) for at in forwards
    )


def _fuse(schedule: Schedule, routes: Sequence[Routes]) -> tuple[Instruction, ...]:
    """The dispatch order, with F and B in one where a stage waits for nothing in between."""
    fusable = {
        stage
        for stage, stage_routes in enumerate(routes)
        if not stage_routes.num_waits and _always_adjacent(schedule, stage)
    }
    instructions: list[Instruction] = []
    for action in dispatch_order(schedule):
        kind: InstructionKind = action.kind
        if action.stage in fusable and kind in ("F", "B"):
            if kind == "B":
                continue
            kind = "FB"
        instructions.append((kind, action.stage, action.microbatch))
    return tuple(instructions)
