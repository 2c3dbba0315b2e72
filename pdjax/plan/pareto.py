"""What was laid so far, as rows of a table, of which only those worth going on with are kept.

A row stands for a chain of parts that cover all layers from `FIRST` on. Rows that go on from the
same start (`ORIGIN`) compete: one that leaves fewer layers, wants fewer microbatches in flight,
leaves less to be kept in memory by what comes before, and whose cut is allowed on as many levels,
is at least as good, whatever comes before.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pdjax.plan.cost_model import Part

ORIGIN, FIRST, DEMAND, COUNT, PARENT, STOP, REPLICAS, UNIT, REMAT, INNER = range(10)
"""Columns: the start that the row goes on from, its first layer, the microbatches that its stages
want in flight together, its number of stages; and for its first part what it was put before (a
number in the `Trail`, -1 for nothing), where it ends, its replicas and first unit, whether it
repeats its forward pass, and what it consists of (a number in the `Trail`, -1 for nothing)."""

NUM_COLUMNS = 10
NOTHING = -1

Rows = np.ndarray
"""Shape (rows, `NUM_COLUMNS`), int64."""


def no_rows() -> Rows:
    """A table without rows."""
    return np.empty((0, NUM_COLUMNS), np.int64)


def make_rows(size: int, **columns: Any) -> Rows:
    """A table from some columns, by their names in lower case; the others are 0."""
    rows = np.zeros((size, NUM_COLUMNS), np.int64)
    for name, values in columns.items():
        rows[:, globals()[name.upper()]] = values
    return rows


def join(tables: Sequence[Rows]) -> Rows:
    """All rows of some tables."""
    return np.concatenate(tables) if tables else no_rows()


class Trail:
    """All rows that were gone on from, so that a plan can be read back from its last row."""

    def __init__(self) -> None:
        self._tables: list[Rows] = []
        self._starts = [0]

    def add(self, rows: Rows) -> np.ndarray:
        """Notes rows; returns their numbers."""
        start = self._starts[-1]
        self._tables.append(rows)
        self._starts.append(start + len(rows))
        return np.arange(start, start + len(rows))

    def _row(self, number: int) -> np.ndarray:
        table = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._tables[table][number - self._starts[table]]

    def parts(self, number: int) -> tuple[Part, ...]:
        """The parts of a chain, the first one first."""
        found = []
        while number != NOTHING:
            row = self._row(number)
            inner = self.parts(int(row[INNER])) if row[INNER] != NOTHING else ()
            first, stop, replicas, unit = (int(row[at]) for at in (FIRST, STOP, REPLICAS, UNIT))
            found.append(Part(first, stop, replicas, unit, inner, bool(row[REMAT])))
            number = int(row[PARENT])
        return tuple(found)


def drop_dominated(
    rows: Rows, burden: np.ndarray, levels: np.ndarray, *, fewer_stages: bool = True
) -> Rows:
    """Without the rows that another one of the same origin is at least as good as.

    Args:
        rows: the table.
        burden: for each row what it leaves to be kept in memory, as a rank from 0 on.
        levels: for each row the number of levels on which its cut is allowed.
        fewer_stages: whether a row with fewer stages may beat one with more; otherwise only rows
            with equally many compete.
    """
    if len(rows) <= 1:
        return rows
    counts = rows[:, COUNT]
    group = rows[:, ORIGIN] * 1
    if not fewer_stages:
        group = group * (int(counts.max()) + 1) + counts
    counts = counts * fewer_stages
    order = np.lexsort((burden, -levels, rows[:, DEMAND], counts, rows[:, FIRST], group))
    order = _drop_neighbours(order, group, rows[:, DEMAND], burden, -levels, counts)
    rows, burden, levels, group = rows[order], burden[order], levels[order], group[order]
    counts, demand = counts[order], rows[:, DEMAND]
    # Every group gets a range of numbers of its own, later ones lower ones, so that one running
    # minimum over all rows starts again with each group.
    most = int(burden.max()) + 1
    base = (group[-1] - group) * (most + 1)
    kind = (demand * (int(levels.max()) + 1) + levels) * (int(counts.max()) + 1) + counts
    kept = np.ones(len(rows), bool)
    for at in np.unique(kind, return_index=True)[1]:
        rivals = (demand <= demand[at]) & (levels >= levels[at]) & (counts <= counts[at])
        lightest = np.minimum.accumulate(np.where(rivals, burden, most) + base)
        beaten = lightest[:-1] <= burden[1:] + base[1:]
        kept[1:] &= ~(beaten & (kind[1:] == kind[at]))
    return rows[kept]


def _drop_neighbours(order: np.ndarray, group: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """The order without most rows that one a little before is at least as good as.

    This is quick, and leaves little to be compared in full.
    """
    for step in (1, 2, 3, 1):
        early, late = order[:-step], order[step:]
        beaten = group[early] == group[late]
        for column in columns:
            beaten &= column[early] <= column[late]
        order = np.concatenate([order[:step], late[~beaten]])
    return order


def one_of_each(rows: Rows) -> Rows:
    """Of the rows with equal origin, count and first layer the one with the least demand."""
    order = np.lexsort((rows[:, DEMAND], rows[:, FIRST], rows[:, COUNT], rows[:, ORIGIN]))
    rows = rows[order]
    same = (rows[1:, (ORIGIN, COUNT, FIRST)] == rows[:-1, (ORIGIN, COUNT, FIRST)]).all(axis=1)
    return rows[np.concatenate([[True], ~same])] if len(rows) else rows
