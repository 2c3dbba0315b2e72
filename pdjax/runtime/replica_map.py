"""Where the stages are: a *replica* of a stage is one of its copies, on one worker."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from pdjax.schedules import Schedule


@dataclass(frozen=True)
class ReplicaMap:
    """The replicas of all stages, stage after stage. A stage on one worker is one replica.

    Attributes:
        stage_of: for each replica its stage.
        worker_of: for each replica its worker.
    """

    stage_of: tuple[int, ...]
    worker_of: tuple[int, ...]

    @classmethod
    def of(cls, schedule: Schedule) -> ReplicaMap:
        """The replicas of a schedule."""
        pairs = [(s, worker) for s, held in enumerate(schedule.holders) for worker in held]
        return cls(tuple(s for s, _ in pairs), tuple(worker for _, worker in pairs))

    def __len__(self) -> int:
        return len(self.stage_of)

    @cached_property
    def num_replicas(self) -> tuple[int, ...]:
        """For each stage the number of its replicas."""
        return tuple(self.stage_of.count(stage) for stage in range(self.stage_of[-1] + 1))

    @cached_property
    def _first(self) -> tuple[int, ...]:
        return (0, *accumulate(self.num_replicas))

    def of_stage(self, stage: int) -> range:
        """The replicas of a stage."""
        return range(self._first[stage], self._first[stage + 1])

    def on_worker(self, worker: int, stage: int) -> int:
        """The replica of a stage on a worker."""
        return next(at for at in self.of_stage(stage) if self.worker_of[at] == worker)
