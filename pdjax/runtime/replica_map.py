"""Where the stages are: every replica of a stage is a *place*, on one worker."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from pdjax.schedules import Schedule


@dataclass(frozen=True)
class Places:
    """The replicas of all stages, stage after stage. Without replicas a place is a stage.

    Attributes:
        stage_of: for each place its stage.
        worker_of: for each place its worker.
    """

    stage_of: tuple[int, ...]
    worker_of: tuple[int, ...]

    @classmethod
    def of(cls, schedule: Schedule) -> Places:
        """The places of a schedule."""
        pairs = [(s, worker) for s, held in enumerate(schedule.holders) for worker in held]
        return cls(tuple(s for s, _ in pairs), tuple(worker for _, worker in pairs))

    @cached_property
    def replicas(self) -> tuple[int, ...]:
        """For each stage the number of its replicas."""
        return tuple(self.stage_of.count(stage) for stage in range(self.stage_of[-1] + 1))

    @cached_property
    def _first(self) -> tuple[int, ...]:
        return (0, *accumulate(self.replicas))

    def of_stage(self, stage: int) -> range:
        """The places of a stage."""
        return range(self._first[stage], self._first[stage + 1])

    def pick(self, stage: int, turn: int) -> int:
        """The place of a stage whose turn it is; `turn` counts microbatches in a cycle."""
        return self._first[stage] + turn % self.replicas[stage]

    def at(self, worker: int, stage: int) -> int:
        """The place of a stage on a worker."""
        return next(place for place in self.of_stage(stage) if self.worker_of[place] == worker)
