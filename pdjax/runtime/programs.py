"""All that is compiled for minibatches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Sharding

from pdjax.communication.all_reduce import MeanOfState, Reduce
from pdjax.runtime.binder import Binder, StageBinding
from pdjax.runtime.listing import Listing
from pdjax.runtime.metrics import Results
from pdjax.runtime.microbatches import Slicing
from pdjax.runtime.replica_map import ReplicaMap
from pdjax.runtime.routing import find_routes
from pdjax.runtime.stage import StageRunner
from pdjax.runtime.update import UpdateRunner
from pdjax.schedules import Schedule
from pdjax.schedules.lower import (
    ProgramKind,
    StageInterface,
    find_fusions,
    lower_cycle,
)
from pdjax.schedules.weight_rule import WeightRule
from pdjax.split.differentiate import Remat, differentiate
from pdjax.split.stages import StageSplit
from pdjax.trace.jit import Values
from pdjax.trees import place


class Passes:
    """The compiled passes of all stages for minibatches of one shape.

    Args:
        split: the loss function, cut into stages.
        placements: for each replica where it is.
        schedule: what a step does.
        rule: which weights the passes read.
        slicing: how minibatches divide into microbatches.
        remat: for each stage what its backward pass computes again.
        updates: the update of each replica.
        metric_axes: the axes along which metrics are concatenated; None for those to be combined.
        consts: for each replica the closed-over arrays that it reads, in place.
        is_local: for each replica whether this process runs it.
        averages_state: whether mutable state is averaged over the microbatches of a minibatch.
        reduces: for each stage with replicas the sum of their gradients, and the mean of their
            mutable state if it has one.

    Attributes:
        replicas: where the stages are.
        stages: the passes of each replica.
        routes: for each stage where its outputs go.
        listing: what this process does with every minibatch.
        kinds: for each replica the kinds of its programs.
        stash_bytes: for each replica what a microbatch keeps from its forward pass on.
        held_bytes: for each replica what it keeps between input part and weight part.
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
        is_local: Sequence[bool],
        averages_state: bool = False,
        reduces: Mapping[int, tuple[Reduce, MeanOfState | None]] | None = None,
    ) -> None:
        self.split, self.slicing, self.consts = split, slicing, consts
        self.results = Results(split, slicing.num_microbatches, metric_axes, placements[-1])
        self.replicas = replicas = ReplicaMap.of(schedule)
        self._schedule, self._rule, self._is_local = schedule, rule, is_local
        self._updates, self._reduces = updates, reduces or {}
        self._averages_state = averages_state
        programs = differentiate(split, remat)
        self.stages = tuple(
            StageRunner(programs[stage], placement, update)
            for stage, placement, update in zip(replicas.stage_of, placements, updates, strict=True)
        )
        self.routes = find_routes(split, programs)
        divided = {action.stage for action in schedule.actions if action.kind == "I"}
        self.stash_bytes = tuple(runner.programs.saved_bytes for runner in self.stages)
        self.held_bytes = tuple(
            runner.divided.backward.held_bytes if stage in divided else 0
            for runner, stage in zip(self.stages, replicas.stage_of, strict=True)
        )
        self.interfaces = tuple(
            StageInterface(routes.forward_bytes, routes.backward_bytes, stash_bytes, held_bytes)
            for routes, stash_bytes, held_bytes in zip(
                self.routes, *map(self._of_stages, (self.stash_bytes, self.held_bytes)), strict=True
            )
        )
        alone = all(update.num_phases == 1 for update in updates) and not self.results.weighted
        waits = [len(routes.cotangents) for routes in self.routes]
        fusions = find_fusions(schedule, rule, waits, updates_alone=alone)
        self._rows = lower_cycle(schedule, rule, self.interfaces, fusions)
        found: list[set[ProgramKind]] = [set() for _ in self.stages]
        for row in (row for rows in self._rows for row in rows):
            found[replicas.on_worker(row.worker, row.stage)].add(row.kind)
        self.kinds = tuple(map(frozenset, found))

    def _of_stages(self, values: Sequence[int]) -> list[int]:
        """For each stage the value of its first replica."""
        return [values[held[0]] for held in map(self.replicas.of_stage, range(len(self.routes)))]

    @property
    def listing(self) -> Listing:
        """What this process does with every minibatch; bound when it is first asked for."""
        return self._listing

    @cached_property
    def _listing(self) -> Listing:
        """The instructions of this process."""
        schedule, replicas = self._schedule, self.replicas
        bindings = []
        for replica, stage in enumerate(replicas.stage_of):
            part = self.split.stages[stage]
            bindings.append(
                StageBinding(
                    self.stages[replica],
                    self.routes[stage],
                    self.consts[replica],
                    part.state,
                    part.updates,
                    self._averages_state,
                    self._updates[replica],
                    schedule.per_update[stage],
                )
            )
        binder = Binder(
            self._rows,
            schedule.cycle,
            bindings,
            replicas,
            self._is_local,
            len(self.split.results),
            weighted=self.results.weighted,
            reduces=self._reduces,
        )
        return binder.listing()

    def lowerings(self, key: Any) -> Iterator[Callable[[], Any]]:
        """For each program that a step runs, a function that lowers it.

        Those that were compiled before are found again by `jax.jit`.

        Args:
            key: the shape of the base key.
        """
        accumulates = self.slicing.num_microbatches > 1
        for runner, kinds, local in zip(self.stages, self.kinds, self._is_local, strict=True):
            for kind in sorted(kinds) if local else ():
                if kind == "U":
                    yield from runner.update.lowerings()
                else:
                    yield from runner.lowerings(kind, key, accumulates)


class PlacedConsts:
    """The arrays that loss functions closed over, each moved to the devices of a replica once.

    Args:
        placements: for each replica where it is.
        is_local: for each of them whether it is in this process.
    """

    def __init__(self, placements: Sequence[Sharding], is_local: Sequence[bool]) -> None:
        self._placements = placements
        self._is_local = is_local
        self._placed: dict[tuple[int, int], tuple[Any, jax.Array]] = {}

    def of(self, split: StageSplit, replicas: ReplicaMap) -> tuple[Values, ...]:
        """For each replica of this process the arrays that its stage reads, there."""
        values = split.traced.program.consts
        return tuple(
            tuple(self._at(values[i], at) for i in split.stages[stage].consts)
            if self._is_local[at]
            else ()
            for at, stage in enumerate(replicas.stage_of)
        )

    def _at(self, value: Any, at: int) -> jax.Array:
        key = id(value), at
        if key not in self._placed:  # it holds the value, too, so that its id stays its own
            self._placed[key] = value, place(value, self._placements[at])
        return self._placed[key][1]
