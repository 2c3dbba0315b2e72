"""What is looked up again and again while plans are tried.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pdjax.plan.cost_model import BUFFERS, Costs
from pdjax.plan.reach import Reach
from pdjax.plan.sums import Sums, next_narrower, part_sums


class LookupTables:
    """What does not depend on the time limit.

    Args:
        costs: the layers and the workers.

    Attributes:
        costs: the same.
        burden_rank: for each layer what a cut before it leaves to the stage before, as a rank.
        narrower: for each layer the next one with a narrower cut before it.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.burden_rank = _burden_rank(costs)
        self.narrower = next_narrower(costs.width_bytes)
        self._fitting: dict[tuple[float, bool], np.ndarray] = {}
        self._ahead: dict[bool, Reach] = {}
        self._stage_sums: dict[tuple[int, bool], Sums] = {}
        inside = np.arange(1, costs.num_layers)
        self._cuts = np.concatenate([[0], inside[np.isfinite(costs.width_bytes[1:-1])]])

    def nth_cut(self, number: np.ndarray) -> np.ndarray:
        """The first layers that so many stages can end before; the last layer's if none."""
        found = self._cuts[np.clip(number, 0, len(self._cuts) - 1)]
        return np.where(number < len(self._cuts), found, self.costs.num_layers)

    def ahead(self, replicate: bool) -> Reach:
        """How far pipelines that begin with the first layer reach, in mirrored layers."""
        if replicate not in self._ahead:
            self._ahead[replicate] = Reach(self.costs, replicate=replicate, mirrored=True)
        return self._ahead[replicate]

    def stage_sums(self, outer: int, remat: bool) -> Sums:
        """The seconds of stages that are replicated `outer` times on outer levels."""
        key = outer if self.costs.cost.num_microbatches else 1, remat
        if key not in self._stage_sums:
            self._stage_sums[key] = part_sums(self.costs, 0, key[0], remat)
        return self._stage_sums[key]

    def fitting(
        self, limit_bytes: float, warm_up: np.ndarray, stop: np.ndarray, remat: bool
    ) -> np.ndarray:
        """For each pair of a warm-up and a stop the first layer from which a stage may fit.

        What crosses the cut before it is not counted.
        """
        key = limit_bytes, remat
        size = int(warm_up.max(initial=0)) + 1
        table = self._fitting.get(key, np.empty((0, self.costs.num_layers + 1), np.int64))
        if len(table) < size:
            more = np.arange(len(table), max(size, 2 * len(table)))
            table = np.concatenate([table, self._rows(limit_bytes, more, remat)])
            self._fitting[key] = table
        return table[warm_up, stop]

    def _rows(self, limit_bytes: float, warm_up: np.ndarray, remat: bool) -> np.ndarray:
        costs, each = self.costs, warm_up[:, None]
        shape = len(warm_up), costs.num_layers + 1
        stop = np.broadcast_to(np.arange(costs.num_layers + 1), shape)
        return first_true(
            lambda first: costs.bytes_but_input(first, stop, each, remat) <= limit_bytes, stop
        )


def _burden_rank(costs: Costs) -> np.ndarray:
    """For each layer what a cut before it leaves to the stage before, as a rank.

    That stage keeps the weights and the stash of the layers up to the cut, at the least once each,
    and buffers for the cut. The fewer layers, the less; but the cut may be wide.
    """
    memory = costs.memory
    times = memory.in_flight(0) if memory.remat == "none" else 1
    burden = memory.param_copies(0) * costs.param_bytes + times * costs.stash_bytes
    return np.unique(burden + BUFFERS * costs.width_bytes, return_inverse=True)[1]


def first_true(holds: Callable[[np.ndarray], np.ndarray], stop: np.ndarray) -> np.ndarray:
    """For each stop the first layer at which `holds`, which then holds up to the stop."""
    low, high = np.zeros_like(stop), stop.copy()
    while (low < high).any():
        middle = (low + high) // 2
        good = holds(middle)
        high = np.where(good, middle, high)
        low = np.where(good, low, np.minimum(middle + 1, high))
    return high


def every_first(lowest: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a row's index and a first layer from `lowest` on, before its stop."""
    counts = np.maximum(stop - lowest, 0)
    index = np.repeat(np.arange(len(stop)), counts)
    begin = np.cumsum(counts) - counts
    return index, lowest[index] + np.arange(counts.sum()) - begin[index]
