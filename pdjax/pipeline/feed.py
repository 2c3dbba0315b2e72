"""Hands minibatches to the stages: to each the microbatches and the leaves that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from pdjax.pipeline.batch import BatchSpec
from pdjax.runtime.microbatches import MicrobatchSlicer
from pdjax.runtime.programs import Passes
from pdjax.runtime.replica_map import ReplicaMap
from pdjax.runtime.state import Feed, Run
from pdjax.schedules import Schedule
from pdjax.split.stages import StageSplit
from pdjax.trees import own_copy


class InputFeed:
    """Divides minibatches and moves them to the replicas of this process.

    Args:
        schedule: what a step does.
        placements: for each replica where it is.
        is_local: for each replica whether this process runs it.
        keys: for each replica the base key.
        spec: what a minibatch looks like.

    Attributes:
        keys: for each replica the base key.
    """

    def __init__(
        self,
        schedule: Schedule,
        placements: Sequence[Sharding],
        is_local: Sequence[bool],
        keys: Sequence[Any],
        spec: BatchSpec,
    ) -> None:
        self._schedule = schedule
        self._replicas = ReplicaMap.of(schedule)
        self._placements = placements
        self._is_local = is_local
        self.keys = keys
        self._spec = spec

    def slicers(self) -> list[MicrobatchSlicer]:
        """For each replica what divides minibatches of one shape.

        Under an asynchronous schedule a batch may be read after the step that brought it has
        returned, when its owner may have given its memory away.
        """
        keeps = self._schedule.flushes
        return [MicrobatchSlicer(each, keeps_in_place=keeps) for each in self._placements]

    def feed(
        self, run: Run, passes: Passes, slicers: Sequence[MicrobatchSlicer], leaves: Sequence[Any]
    ) -> Feed:
        """Moves a minibatch to the replicas that read it, to each the microbatches that it runs.

        Args:
            run: what was handed over so far.
            passes: the programs for minibatches of this shape.
            slicers: what divides minibatches of this shape.
            leaves: the leaves of the minibatch.

        Raises:
            ValueError: if a leaf that this process reads is a shape only.
        """
        leaves = self.taken(passes.split, leaves)
        before = (run.num_microbatches_seen - run.start) % self._schedule.cycle
        parts = [
            slicer.slice(
                leaves,
                passes.split.stages[self._replicas.stage_of[replica]].batch,
                passes.slicing,
                self._turns(replica, before),
            )
            if self._is_local[replica]
            else ()
            for replica, slicer in enumerate(slicers)
        ]
        return Feed(passes, parts, self.keys)

    def _turns(self, replica: int, before: int) -> range:
        """The microbatches of a minibatch that a replica runs; `before` it came others."""
        held = self._replicas.of_stage(self._replicas.stage_of[replica])
        first = (replica - held[0] - before) % len(held)
        return range(first, self._schedule.num_microbatches, len(held))

    def read_by(self, stages: StageSplit) -> set[int]:
        """The batch leaves that the stages of this process read."""
        pairs = zip(self._replicas.stage_of, self._is_local, strict=True)
        local = {stage for stage, is_local in pairs if is_local}
        return {index for stage in local for index in stages.stages[stage].batch}

    def taken(self, stages: StageSplit, leaves: Sequence[Any]) -> list[Any]:
        """Copies of the batch leaves that the stages of this process read; None for the others.

        Raises:
            ValueError: if one of them is a shape only.
        """
        read = self.read_by(stages)
        missing = [i for i in sorted(read) if isinstance(leaves[i], jax.ShapeDtypeStruct)]
        if missing:
            names = [self._spec.names[i] for i in missing]
            raise ValueError(
                f"the batch has only the shape of {names}, which a stage of this process reads. "
                "Hand over the arrays; pipe.reads() says which are needed."
            )
        return [own_copy(leaf) if i in read else None for i, leaf in enumerate(leaves)]
