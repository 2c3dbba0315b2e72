"""What is looked up in arrays over the layers: how far parts reach, and where cuts are narrow.

Nothing here imports JAX.
"""

from __future__ import annotations

import math

import numpy as np

from pdjax.plan.cost_model import Costs

_ROUNDING = 4e-16  # share of the sum over all layers by which differences may be off


class Sums:
    """Times that grow with the layers, for every number of units.

    Args:
        tables: seconds of the layers before each layer, times the number of units; shape
            (units + 1, layers + 1). A part of m units is quick enough if its difference in row m
            is at most a limit, in all tables.
    """

    def __init__(self, *tables: np.ndarray) -> None:
        self._tables = tables
        self._slack = [_ROUNDING * table[:, -1] for table in tables]

    def quick(
        self, m: np.ndarray, first: np.ndarray, stop: np.ndarray, limit_s: np.ndarray
    ) -> np.ndarray:
        """Whether the layers first … stop take at most `limit_s` on m units; of one shape."""
        good = np.ones(np.broadcast_shapes(m.shape, first.shape), bool)
        for table, slack in zip(self._tables, self._slack, strict=True):
            good &= table[m, stop] - table[m, first] <= limit_s + slack[m]
        return good

    def first(self, m: int, stop: np.ndarray, limit_s: np.ndarray) -> np.ndarray:
        """For each stop the smallest first layer with which m units take at most `limit_s`."""
        found = np.zeros(len(stop), np.int64)
        for table, slack in zip(self._tables, self._slack, strict=True):
            least = table[m][stop] - limit_s - slack[m]
            found = np.maximum(found, np.searchsorted(table[m], least))
        return found


def part_sums(costs: Costs, level: int, outer: int, remat: bool, *, mirrored: bool = False) -> Sums:
    """The seconds of parts of 1, 2, … units of a level, times their number.

    Where the all-reduce is added, it counts for each worker inside a unit, as the work does: so
    many seconds they have together. Where it overlaps, only stages have work, too.

    Args:
        costs: the layers and the workers.
        level: of the units.
        outer: how often all of them are replicated on outer levels.
        remat: whether forward passes are repeated.
        mirrored: whether to take the layers in reverse order.
    """
    work = costs.compute_s + (costs.forward_s if remat else 0.0)
    params = costs.param_bytes
    if mirrored:
        work, params = work[-1] - work[::-1], params[-1] - params[::-1]
    units = costs.topology.levels
    each = costs.sync_s_per_byte(np.arange(1, units[level].num_units + 1), level, outer)
    sync = np.concatenate([[0.0], each])[:, None] * params
    if costs.cost.overlap:
        return Sums(sync) if level else Sums(np.broadcast_to(work, sync.shape), sync)
    return Sums(work + math.prod(inner.num_units for inner in units[:level]) * sync)


def next_narrower(width: np.ndarray) -> np.ndarray:
    """For each layer the next one with a narrower cut before it; the end if there is none."""
    count = len(width)
    following = np.full(count, count - 1)
    waiting: list[int] = []
    for at in range(count):
        while waiting and width[at] < width[waiting[-1]]:
            following[waiting.pop()] = at
        waiting.append(at)
    return following
