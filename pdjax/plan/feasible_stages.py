"""One stage more before each of many partial plans, all at once.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pdjax.plan.cost_model import Costs
from pdjax.plan.lookup import LookupTables, every_first
from pdjax.plan.pareto import DEMAND, FIRST, Rows

Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Indices of rows, the first layers of their new stages, and whether these repeat their forward
pass."""


def num_levels(costs: Costs, first: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """On how many levels a cut before each of `first` is quick enough.

    Args:
        costs: the layers and the workers.
        first: layers, shape (rows,).
        widths: the widest cuts of the levels, shape (levels, rows).
    """
    return ((costs.width_bytes[first] <= widths) | (first == 0)).sum(axis=0)


class StageSearch:
    """Where the new stages may begin.

    Args:
        tables: the layers and the workers.
        rows: what was laid before, one row for each stage to be laid.
        replicas: for each row the number of workers of the new stage.
        limit_bytes: for each row the memory of these; None if memory is not charged.
        widths: for each level and row the widest cut.
        in_time: for each row the first layer from which the stage is quick enough; for each way,
            without or with a repeated forward pass, that may be used.

    Attributes:
        demand: for each row the microbatches that are then wanted in flight; 0 if memory is not
            charged.
    """

    def __init__(
        self,
        tables: LookupTables,
        rows: Rows,
        *,
        replicas: np.ndarray,
        limit_bytes: np.ndarray | None,
        widths: np.ndarray,
        in_time: dict[bool, np.ndarray],
    ) -> None:
        self.tables, self.costs = tables, tables.costs
        self.stop, self.widths, self.limit_bytes = rows[:, FIRST], widths, limit_bytes
        self.warm_up = -(-rows[:, DEMAND] // replicas)
        self.demand = replicas * (self.warm_up + 1) * (limit_bytes is not None)
        self.lowest = {again: self._lowest(first, again) for again, first in in_time.items()}

    def _lowest(self, in_time: np.ndarray, remat: bool) -> np.ndarray:
        """For each row a first layer before which the stage cannot begin."""
        if self.limit_bytes is None:
            return in_time
        lowest = in_time.copy()
        for limit in np.unique(self.limit_bytes[np.isfinite(self.limit_bytes)]):
            mine = np.flatnonzero(self.limit_bytes == limit)
            fitting = self.tables.fitting(limit, self.warm_up[mine], self.stop[mine], remat)
            lowest[mine] = np.maximum(lowest[mine], fitting)
        return lowest

    def _fits(self, index: np.ndarray, first: np.ndarray, remat: bool) -> np.ndarray:
        if self.limit_bytes is None:
            return np.ones(len(first), bool)
        needed = self.costs.bytes_of(first, self.stop[index], self.warm_up[index], remat)
        return needed <= self.limit_bytes[index]

    def _first_fitting(self, remat: bool) -> np.ndarray:
        """For each row the first layer that the stage may begin with, for all but its cut."""
        first = self.lowest[remat].copy()
        if self.limit_bytes is None:
            return first
        waiting = np.flatnonzero(first < self.stop)
        while len(waiting):
            waiting = waiting[~self._fits(waiting, first[waiting], remat)]
            first[waiting] += 1
            waiting = waiting[first[waiting] < self.stop[waiting]]
        return first

    def narrowing(self) -> Iterator[Found]:
        """For each row the longest stage, and shorter ones only where that may be of use.

        That is where the cut is allowed on more levels, or leaves less to be kept in memory.
        """
        firsts = [self._first_fitting(remat) for remat in self.lowest]
        first = np.minimum.reduce(firsts)
        remat = first < firsts[0] if len(firsts) > 1 else np.full(len(first), True in self.lowest)
        index = np.arange(len(first))
        before, lightest = np.zeros_like(first), np.full_like(first, self.costs.num_layers + 1)
        while True:
            going = first < self.stop[index]
            index, first, remat = index[going], first[going], remat[going]
            before, lightest = before[going], lightest[going]
            levels = num_levels(self.costs, first, self.widths[:, index])
            burden = self.tables.burden_rank[first] * (self.limit_bytes is not None)
            better = (levels > before) | ((levels > 0) & (burden < lightest))
            yield index[better], first[better], remat[better]
            before = np.maximum(before, levels)
            lightest = np.where(better, np.minimum(lightest, burden), lightest)
            # A cut further on that is not narrower is worse in every way.
            going = (before < len(self.widths)) | (lightest > 0)
            if not going.any():
                return
            index, first, remat = index[going], self.tables.narrower[first[going]], remat[going]
            before, lightest = before[going], lightest[going]

    def everywhere(self) -> Iterator[Found]:
        """For each row all first layers that the stage may begin with."""
        lowest = np.minimum.reduce(list(self.lowest.values()))
        index, first = every_first(lowest, self.stop)
        allowed = num_levels(self.costs, first, self.widths[:, index]) > 0
        index, first = index[allowed], first[allowed]
        able = {
            remat: (first >= lowest[index]) & self._fits(index, first, remat)
            for remat, lowest in self.lowest.items()
        }
        possible = np.logical_or.reduce(list(able.values()))
        again = ~able[False] if False in able else possible
        yield index[possible], first[possible], again[possible]
