"""The all-reduces among the replicas of a stage: one for each round, before its updates.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdjax.schedules.columns import Columns
from pdjax.schedules.dependencies import Rounds
from pdjax.simulate.messages import Messages
from pdjax.simulate.network import find_links
from pdjax.simulate.stage_cost import StageCost
from pdjax.topology.topology import Topology


@dataclass(frozen=True, eq=False)
class AllReduces:
    """The all-reduces of one stage, in order: one for each round.

    Attributes:
        stage: the stage.
        workers: its workers in the schedule, in the order of the ring.
        rounds: the gradients that each all-reduce waits for, and the updates that wait for it.
        seconds: how long each takes.
        num_bytes: the bytes that each worker sends to the next one of the ring.
    """

    stage: int
    workers: tuple[int, ...]
    rounds: Rounds
    seconds: float
    num_bytes: float

    def __len__(self) -> int:
        return len(self.rounds.microbatch)

    def messages(self, first: int) -> Messages:
        """Their messages from gradients and to updates, if they are tasks from `first` on."""
        gradients, updates = self.rounds.gradients, self.rounds.updates
        source = np.concatenate([gradients[0], updates[0] + first])
        target = np.concatenate([gradients[1] + first, updates[1]])
        return Messages(source, target, np.zeros(len(source)))


def all_reduces_of(
    columns: Columns,
    costs: Sequence[StageCost],
    holders: Sequence[Sequence[int]],
    workers: np.ndarray,
    topology: Topology | None,
) -> list[AllReduces]:
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
            rounds = Rounds.of(columns, stage)
            found.append(AllReduces(stage, tuple(mine), rounds, seconds, num_bytes))
    return found


def _slowest(ring: np.ndarray, topology: Topology | None) -> float:
    if topology is None:
        return np.inf
    return float(find_links(topology, ring, np.roll(ring, -1)).bytes_per_s.min())
