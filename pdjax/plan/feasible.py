"""Whether a plan takes at most a given time, and which one.

Parts are laid from the last layer to the first. For every number of units, all that is worth going
on with is kept (see `pareto`). A part of an outer level is laid as a pipeline of its own on the
units inside. Everything works on tables of rows at once.

Nothing here imports JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from pdjax.plan.cost_model import Part
from pdjax.plan.feasible_stages import StageSearch, num_levels
from pdjax.plan.lookup import LookupTables, every_first, first_true
from pdjax.plan.pareto import (
    COUNT,
    DEMAND,
    FIRST,
    INNER,
    NOTHING,
    ORIGIN,
    PARENT,
    Rows,
    Trail,
    drop_dominated,
    join,
    make_rows,
    one_of_each,
)

_GENEROUS = 1 + 1e-9  # times a time limit, so that no bound is too strict by rounding
_WIDEST = np.finfo(float).max  # below the infinite width of a cut that is not allowed


@dataclass(frozen=True)
class Constraints:
    """What kind of plan is looked for.

    Attributes:
        replicate: whether stages may be replicated.
        num_stages: how many stages; None for any number.
        counting: ``"exact"``: exactly as many, and nothing is missed; ``"likely"``: exactly as
            many, but only of partial plans of equally many stages the farthest are gone on with,
            so that a plan may be missed; ``"at_most"``: as many or fewer, and nothing is missed.
        charges_memory: whether the plan must fit.
        extra_bytes: how much larger every memory is taken to be.
    """

    replicate: bool = True
    num_stages: int | None = None
    counting: Literal["exact", "likely", "at_most"] = "exact"
    charges_memory: bool = True
    extra_bytes: float = 0.0


@dataclass(frozen=True)
class SubProblem:
    """Where a pipeline is laid, for each of the starts that it goes on from.

    Attributes:
        level: of its units.
        outer: how many replicas the whole pipeline has.
        bases: the first worker of each of these replicas.
        elsewhere: most stages on the outer units that are left for what comes before.
        limit_s: seconds that it may take: one number, or one for each start.
        at_least: for each start the first layer that it may reach.
        at_most: for each number of units left, 0 among them, and each start: the last layer from
            which they reach far enough, by time alone; shape (units + 1, starts).
        widths: for each level from this one on, and each start, the widest cut.
    """

    level: int
    outer: int
    bases: tuple[int, ...]
    elsewhere: int
    limit_s: float | np.ndarray
    at_least: np.ndarray
    at_most: np.ndarray
    widths: np.ndarray

    def limit_of(self, starts: np.ndarray) -> float | np.ndarray:
        """Seconds that a pipeline may take, for some of the starts."""
        return self.limit_s[starts] if isinstance(self.limit_s, np.ndarray) else self.limit_s


class FeasibilitySearch:
    """Looks for a plan that takes at most `limit_s`.

    Args:
        tables: the layers and the workers.
        limit_s: seconds for each microbatch.
        constraints: what kind of plan.
    """

    def __init__(self, tables: LookupTables, limit_s: float, constraints: Constraints) -> None:
        self.tables, self.costs, self.constraints = tables, tables.costs, constraints
        self._limit_s = limit_s
        self._trail = Trail()
        counts = [level.num_units for level in self.costs.topology.levels]
        self._unit_size = [math.prod(counts[:level]) for level in range(len(counts))]
        self._num_stages = constraints.num_stages or 0
        self._exactly = constraints.num_stages is not None and constraints.counting != "at_most"
        # Where all workers are alike, those that a plan does not need may as well be the first.
        self._leaves_idle = len(set(self.costs.topology.memory_bytes)) > 1

    def run(self) -> tuple[Part, ...] | None:
        """The plan, or None if there is none."""
        top = len(self.costs.topology.levels) - 1
        start = make_rows(1, first=self.costs.num_layers, parent=NOTHING, inner=NOTHING)
        widths = self._widths(np.array([self._limit_s]), top, np.empty((0, 1)))
        zero = np.zeros(1, np.int64)
        at_most = self._at_most(top, 1, zero, self._limit_s)
        if at_most[-1, 0] < self.costs.num_layers:
            return None
        frame = SubProblem(top, 1, (0,), 0, self._limit_s, zero, at_most, widths)
        for rows in self._pipeline(start, frame):
            done = rows[rows[:, FIRST] == 0]
            if self._exactly:
                done = done[done[:, COUNT] == self.constraints.num_stages]
            if len(done):
                return self._trail.parts(int(self._trail.add(done[:1])[0]))
        return None

    def _at_most(
        self, level: int, outer: int, goals: np.ndarray, limit_s: float | np.ndarray
    ) -> np.ndarray:
        """The last layers from which 0, 1, … units reach some goals, by time alone.

        Shape (units + 1, goals).
        """
        count = self.costs.num_layers
        if not math.isfinite(self._limit_s):
            units = self.costs.topology.levels[level].num_units
            return np.full((units + 1, len(goals)), count)
        each = np.broadcast_to(np.asarray(limit_s, float), goals.shape) * _GENEROUS
        pairs, index = np.unique(np.stack([goals, each]), axis=1, return_inverse=True)
        stop = count - pairs[0].astype(np.int64)
        outers = np.full(len(stop), outer)
        ahead = self.tables.ahead(self.constraints.replicate)
        return count - ahead.pipelines(level, stop, pairs[1], outers).first[:, index]

    def _widths(self, limit_s: np.ndarray, level: int, outer: np.ndarray) -> np.ndarray:
        """The widest cuts of a level, put before those of the outer levels."""
        own = np.full(len(limit_s), _WIDEST)
        if self.costs.cost.activations:
            bandwidth = self.costs.topology.levels[level].bandwidth_bytes_per_s
            own = np.minimum(limit_s * bandwidth / 2, _WIDEST)
        return np.concatenate([own[None], outer])

    # -------- pipelines

    def _pipeline(self, starts: Rows, frame: SubProblem) -> Iterator[Rows]:
        """All that is worth laying before some starts, for each number of units."""
        units = self.costs.topology.levels[frame.level].num_units
        begin = starts.copy()
        begin[:, ORIGIN] = np.arange(len(starts))
        kept: list[list[Rows]] = [[] for _ in range(units + 1)]
        kept[0] = [begin]
        for used in range(units + 1):
            rows = self._prune(join(kept[used]), units - used, frame)
            laid = rows[:, FIRST] < starts[rows[:, ORIGIN], FIRST]
            if laid.any():
                yield rows[laid]
            if used == units or not len(rows):
                continue
            if self._leaves_idle:
                kept[used + 1].append(rows)
            # A cut of this level before the next part; the starts were cut on an outer one.
            narrow = self.costs.width_bytes[rows[:, FIRST]] <= frame.widths[0, rows[:, ORIGIN]]
            open_ = (narrow | ~laid) & (rows[:, FIRST] > frame.at_least[rows[:, ORIGIN]])
            ready, begun = rows[open_], laid[open_]
            if not len(ready):
                continue
            numbers = np.full(len(ready), NOTHING)
            numbers[begun] = self._trail.add(ready[begun])
            for m, more in self._parts(ready, numbers, used, frame):
                kept[used + m].append(more)

    def _prune(self, rows: Rows, left: int, frame: SubProblem) -> Rows:
        """The rows worth going on with, on `left` more units."""
        rows = rows[rows[:, FIRST] <= frame.at_most[left, rows[:, ORIGIN]]]
        if self.constraints.num_stages is not None:
            rows = self._hopeful(rows, left * self._unit_size[frame.level] + frame.elsewhere)
            if self.constraints.counting == "exact":
                return one_of_each(rows)
        burden = self.tables.burden_rank[rows[:, FIRST]] * self.constraints.charges_memory
        levels = num_levels(self.costs, rows[:, FIRST], frame.widths[:, rows[:, ORIGIN]])
        return drop_dominated(rows, burden, levels, fewer_stages=not self._exactly)

    def _hopeful(self, rows: Rows, most: int) -> Rows:
        """The rows that can still get the wanted number of stages, by at most so many more."""
        left = self._num_stages - rows[:, COUNT]
        if not self._exactly:
            return rows[(left > 0) | ((left == 0) & (rows[:, FIRST] == 0))]
        able = (left >= 0) & (left <= most)
        rows, left = rows[able], left[able]
        done = (left > 0) | (rows[:, FIRST] == 0)
        return rows[done & (rows[:, FIRST] >= self.tables.nth_cut(left))]

    def _parts(
        self, ready: Rows, numbers: np.ndarray, used: int, frame: SubProblem
    ) -> Iterator[tuple[int, Rows]]:
        """One part more before each row, for each number of units; `numbers` are the rows' own."""
        free = self.costs.topology.levels[frame.level].num_units - used
        replicas = range(1, free + 1 if self.constraints.replicate else 2)
        if frame.level == 0:
            yield from self._stages(ready, numbers, replicas, free, frame)
            return
        for m in replicas:
            simple = self.costs.cost.overlap or m == 1 or not math.isfinite(self._limit_s)
            lay = self._nested if simple else self._nested_sum
            for inner, origin in lay(ready, m, free - m, frame):
                more = make_rows(
                    len(inner),
                    origin=ready[origin, ORIGIN],
                    first=inner[:, FIRST],
                    demand=inner[:, DEMAND],
                    count=inner[:, COUNT],
                    parent=numbers[origin],
                    stop=ready[origin, FIRST],
                    replicas=m,
                    unit=free - m,
                    inner=self._trail.add(inner),
                )
                yield m, more

    def _inside(
        self,
        m: int,
        unit: int,
        frame: SubProblem,
        limit_s: float | np.ndarray,
        at_least: np.ndarray,
        at_most: np.ndarray,
        origin: np.ndarray,
    ) -> SubProblem:
        """The frame of a pipeline on the units inside of `m` units of `frame`."""
        each = np.broadcast_to(np.asarray(limit_s, float), (len(origin),))
        widths = self._widths(each, frame.level - 1, frame.widths[:, origin])
        bases = self.costs.units(frame.level, unit, m, frame.bases)
        left = frame.elsewhere + unit * self._unit_size[frame.level]
        return SubProblem(
            frame.level - 1, frame.outer * m, bases, left, limit_s, at_least, at_most, widths
        )

    def _nested(
        self, ready: Rows, m: int, unit: int, frame: SubProblem
    ) -> Iterator[tuple[Rows, np.ndarray]]:
        """Pipelines inside `m` units, and for each the row that it goes on from."""
        origin, stop = ready[:, ORIGIN], ready[:, FIRST]
        limit_s = frame.limit_of(origin) * m
        synced = first_true(
            lambda i: self.costs.sync_s(i, stop, m, frame.level, frame.outer) <= limit_s, stop
        )
        at_least = np.maximum(synced, frame.at_least[origin])
        goals = frame.at_most[unit, origin]
        at_most = self._at_most(frame.level - 1, frame.outer * m, goals, limit_s)
        inside = self._inside(m, unit, frame, limit_s, at_least, at_most, origin)
        starts = ready.copy()
        starts[:, PARENT] = starts[:, INNER] = NOTHING
        for rows in self._pipeline(starts, inside):
            yield rows, rows[:, ORIGIN]

    def _nested_sum(
        self, ready: Rows, m: int, unit: int, frame: SubProblem
    ) -> Iterator[tuple[Rows, np.ndarray]]:
        """The same where the all-reduce is added: how much is left depends on where it begins.

        So every first layer is tried that time allows, with the time that its parameters leave.
        """
        most = np.minimum(frame.at_most[unit, ready[:, ORIGIN]] + 1, ready[:, FIRST])
        if self.constraints.num_stages is not None:  # no stage is left for what would come before
            most = np.where(
                ready[:, COUNT] + 1 < self.constraints.num_stages, most, np.minimum(most, 1)
            )
        index, first = every_first(frame.at_least[ready[:, ORIGIN]], most)
        origin, stop = ready[index, ORIGIN], ready[index, FIRST]
        sync = self.costs.sync_s(first, stop, m, frame.level, frame.outer)
        left = frame.limit_of(origin) * m - sync
        able = left >= 0
        index, first, origin, stop, left = (x[able] for x in (index, first, origin, stop, left))
        at_most = self._at_most(frame.level - 1, frame.outer * m, first, left)
        able = stop <= at_most[-1]
        index, first, origin, left, at_most = (
            index[able],
            first[able],
            origin[able],
            left[able],
            at_most[:, able],
        )
        inside = self._inside(m, unit, frame, left, first, at_most, origin)
        starts = ready[index]
        starts[:, PARENT] = starts[:, INNER] = NOTHING
        for rows in self._pipeline(starts, inside):
            exact = rows[rows[:, FIRST] == first[rows[:, ORIGIN]]]
            yield exact, index[exact[:, ORIGIN]]

    # -------- stages

    def _stages(
        self, ready: Rows, numbers: np.ndarray, replicas: range, free: int, frame: SubProblem
    ) -> Iterator[tuple[int, Rows]]:
        """One stage more before each row, for all numbers of units at once."""
        origin, m = ready[:, ORIGIN, None], np.array(replicas)
        least = frame.at_least[origin]
        if self._exactly:  # as many layers are left as stages
            left = self._num_stages - ready[:, COUNT, None] - 1
            least = np.maximum(least, self.tables.nth_cut(left))
        ways = self._ways()
        in_time = {
            again: np.maximum(self._in_time(replicas, ready, frame, again), least) for again in ways
        }
        # Only the stages that leave no more than the units that are left can do.
        able = np.minimum.reduce(list(in_time.values())) <= frame.at_most[free - m, origin]
        row, column = np.nonzero(able)
        m = m[column]
        limits = np.array([self._limit_bytes(each, free, frame) for each in replicas])
        stages = StageSearch(
            self.tables,
            ready[row],
            replicas=m * frame.outer,
            limit_bytes=limits[column] if self.constraints.charges_memory else None,
            widths=frame.widths[:, ready[row, ORIGIN]],
            in_time={again: first[row, column] for again, first in in_time.items()},
        )
        exact = self.constraints.num_stages is not None and self.constraints.counting == "exact"
        found = stages.everywhere() if exact else stages.narrowing()
        index, first, remat = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(m[index], kind="stable")
        index, first, remat = index[order], first[order], remat[order]
        more = make_rows(
            len(index),
            origin=ready[row[index], ORIGIN],
            first=first,
            demand=stages.demand[index],
            count=ready[row[index], COUNT] + (self.constraints.num_stages is not None),
            parent=numbers[row[index]],
            stop=ready[row[index], FIRST],
            replicas=m[index],
            unit=free - m[index],
            remat=remat,
            inner=NOTHING,
        )
        bounds = np.searchsorted(m[index], [*replicas, replicas[-1] + 1])
        for each, (start, stop) in zip(replicas, pairwise(bounds), strict=True):
            if start < stop:
                yield each, more[start:stop]

    def _limit_bytes(self, m: int, free: int, frame: SubProblem) -> float:
        workers = self.costs.units(0, free - m, m, frame.bases)
        return self.costs.limit_bytes(workers) + self.constraints.extra_bytes

    def _ways(self) -> tuple[bool, ...]:
        """Whether forward passes may be repeated."""
        remat = self.costs.memory.remat
        if remat == "auto":
            return (False, True) if self.constraints.charges_memory else (False,)
        return (remat == "full",)

    def _in_time(self, replicas: range, rows: Rows, frame: SubProblem, remat: bool) -> np.ndarray:
        """The first layers from which stages are quick enough; shape (rows, replicas)."""
        sums = self.tables.stage_sums(frame.outer, remat)
        limit_s, stop = np.asarray(frame.limit_of(rows[:, ORIGIN])), rows[:, FIRST]
        found = [np.minimum(sums.first(m, stop, limit_s * m), stop) for m in replicas]
        return np.stack(found, axis=1)
