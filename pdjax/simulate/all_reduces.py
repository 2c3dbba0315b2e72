"""The all-reduces among the replicas of a stage: one for each round of the lowered schedule.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdjax.schedules.columns import Columns
from pdjax.schedules.lower import rounds_of
from pdjax.simulate.messages import Messages
from pdjax.simulate.network import route
from pdjax.simulate.stage_cost import StageCost
from pdjax.topology.topology import Topology


@dataclass(frozen=True, eq=False)
class Reduces:
    """The all-reduces of one stage, in order.

    Attributes:
        stage: the stage.
        workers: its workers in the schedule, in the order of the ring.
        microbatch: for each all-reduce the last microbatch that it is of.
        seconds: how long each takes.
        num_bytes: what each worker sends to the next one of the ring.
        gradients: pairs of the last gradient of a worker and the number of the all-reduce.
        updates: pairs of the number of the all-reduce and an update that waits for it.
    """

    stage: int
    workers: tuple[int, ...]
    microbatch: np.ndarray
    seconds: float
    num_bytes: float
    gradients: np.ndarray
    updates: np.ndarray

    def messages(self, first: int) -> Messages:
        """What they wait for and what waits for them, if they are tasks from `first` on."""
        source = np.concatenate([self.gradients[0], self.updates[0] + first])
        target = np.concatenate([self.gradients[1] + first, self.updates[1]])
        return Messages(source, target, np.zeros(len(source)))


def reduces_of(
    columns: Columns,
    costs: Sequence[StageCost],
    holders: Sequence[Sequence[int]],
    workers: np.ndarray,
    topology: Topology | None,
) -> list[Reduces]:
    """The all-reduces of all stages that have replicas.

    A ring: each worker sends 2 (r - 1) / r of the gradients' bytes to the next one, all at the
    same time, at the pace of the slowest link. Other messages do not slow it down.

    Args:
        columns: the schedule written out.
        costs: of each stage.
        holders: for each stage its workers.
        workers: for each worker of the schedule its number in the topology.
        topology: the machines; None if all-reduces take no time.
    """
    found = []
    for stage, mine in enumerate(holders):
        if len(mine) > 1:
            num_bytes = 2 * (len(mine) - 1) / len(mine) * costs[stage].gradient_bytes
            seconds = num_bytes / _slowest(workers[list(mine)], topology)
            rounds = rounds_of(columns, stage)
            found.append(
                Reduces(
                    stage,
                    tuple(mine),
                    rounds.microbatch,
                    seconds,
                    num_bytes,
                    rounds.gradients,
                    rounds.updates,
                )
            )
    return found


def _slowest(ring: np.ndarray, topology: Topology | None) -> float:
    if topology is None:
        return np.inf
    return float(route(topology, ring, np.roll(ring, -1)).bytes_per_s.min())
