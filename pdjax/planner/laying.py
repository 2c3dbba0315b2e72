"""Whether a plan takes at most a given time, and which one.

Parts are laid from the last layer to the first. For every number of units, all that is worth going
on with is kept (see `frontier`). A part of an outer level is laid as a pipeline of its own on the
units inside. Everything works on tables of rows at once.

Nothing here imports JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdjax.planner.cost_model import Costs, Part
from pdjax.planner.frontier import (
    COUNT,
    DEMAND,
    FIRST,
    INNER,
    NOTHING,
    ORIGIN,
    PARENT,
    Rows,
    Trail,
    join,
    make_rows,
    one_of_each,
    worth_keeping,
)

_WIDEST = np.finfo(float).max  # below the infinite width of a cut that is not allowed


@dataclass(frozen=True)
class Wish:
    """What kind of plan is looked for.

    Attributes:
        straight: whether to replicate nothing.
        num_stages: exactly how many stages; None for any number.
        charges_memory: whether the plan must fit.
        extra_bytes: how much larger every memory is taken to be.
    """

    straight: bool = False
    num_stages: int | None = None
    charges_memory: bool = True
    extra_bytes: float = 0.0


@dataclass(frozen=True)
class _Frame:
    """Where a pipeline is laid, for each of the starts that it goes on from.

    Attributes:
        level: of its units.
        outer: how many replicas the whole pipeline has.
        bases: the first worker of each of these replicas.
        elsewhere: number of workers on outer levels that are left for what comes before.
        limit_s: seconds that it may take: one number, or one for each start.
        at_least: for each start the first layer that it may reach.
        widths: for each level from this one on, and each start, the widest cut.
    """

    level: int
    outer: int
    bases: tuple[int, ...]
    elsewhere: int
    limit_s: float | np.ndarray
    at_least: np.ndarray
    widths: np.ndarray

    def limit_of(self, starts: np.ndarray) -> float | np.ndarray:
        """Seconds that a pipeline may take, for some of the starts."""
        return self.limit_s[starts] if isinstance(self.limit_s, np.ndarray) else self.limit_s


class Tables:
    """What does not depend on the time limit: looked up for every plan that is tried."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.burden_rank = _burden_rank(costs)
        self.narrower = _next_narrower(costs.width_bytes)
        self._fitting: dict[tuple[float, int, bool], np.ndarray] = {}

    def fitting(self, limit_bytes: float, warm_up: int, remat: bool) -> np.ndarray:
        """For each stop the first layer from which a stage may fit, its own input not counted."""
        key = limit_bytes, warm_up, remat
        if key not in self._fitting:
            costs = self.costs
            stop = np.arange(costs.num_layers + 1)
            closed = np.where(np.isinf(costs.width_bytes), 0.0, costs.width_bytes)
            params, stash = costs.param_bytes, costs.stash_bytes
            copies = costs.memory.param_copies(warm_up)
            times = 1 if remat else costs.memory.in_flight(warm_up)
            buffers = 2 * closed if costs.memory.buffers else 0.0

            def fits(first: np.ndarray) -> np.ndarray:
                needed = copies * (params[stop] - params[first])
                needed = needed + times * (stash[stop] - stash[first])
                return needed + buffers <= limit_bytes

            self._fitting[key] = _first_true(fits, stop)
        return self._fitting[key]


class Laying:
    """Looks for a plan that takes at most `limit_s`.

    Args:
        tables: the layers and the workers.
        limit_s: seconds for each microbatch.
        wish: what kind of plan.
    """

    def __init__(self, tables: Tables, limit_s: float, wish: Wish) -> None:
        self.tables, self.costs, self.wish = tables, tables.costs, wish
        self._limit_s = limit_s
        self._trail = Trail()
        self.burden_rank = tables.burden_rank * wish.charges_memory
        self._within: dict[tuple[float, int, int, bool], np.ndarray] = {}
        counts = [level.num_units for level in self.costs.topology.levels]
        self._unit_size = [math.prod(counts[:level]) for level in range(len(counts))]
        # Where all workers are alike, those that a plan does not need may as well be the first.
        self._leaves_idle = len(set(self.costs.topology.memory_bytes)) > 1

    def run(self) -> tuple[Part, ...] | None:
        """The plan, or None if there is none."""
        top = len(self.costs.topology.levels) - 1
        start = make_rows(1, first=self.costs.num_layers, parent=NOTHING, inner=NOTHING)
        widths = self._widths(np.array([self._limit_s]), top, np.empty((0, 1)))
        frame = _Frame(top, 1, (0,), 0, self._limit_s, np.zeros(1, np.int64), widths)
        for rows in self._pipeline(start, frame):
            done = rows[rows[:, FIRST] == 0]
            if self.wish.num_stages is not None:
                done = done[done[:, COUNT] == self.wish.num_stages]
            if len(done):
                return self._trail.parts(int(self._trail.add(done[:1])[0]))
        return None

    def _widths(self, limit_s: np.ndarray, level: int, outer: np.ndarray) -> np.ndarray:
        """The widest cuts of a level, put before those of the outer levels."""
        own = np.full(len(limit_s), _WIDEST)
        if self.costs.cost.activations:
            bandwidth = self.costs.topology.levels[level].bandwidth_bytes_per_s
            own = np.minimum(limit_s * bandwidth / 2, _WIDEST)
        return np.concatenate([own[None], outer])

    def levels(self, first: np.ndarray, origin: np.ndarray, frame: _Frame) -> np.ndarray:
        """On how many levels a cut before `first` is quick enough, from that of `frame` on."""
        allowed = self.costs.width_bytes[first] <= frame.widths[:, origin]
        return (allowed | (first == 0)).sum(axis=0)

    # -------- pipelines

    def _pipeline(self, starts: Rows, frame: _Frame) -> Iterator[Rows]:
        """All that is worth laying before some starts, for each number of units."""
        units = self.costs.topology.levels[frame.level].num_units
        begin = starts.copy()
        begin[:, ORIGIN] = np.arange(len(starts))
        kept: list[list[Rows]] = [[] for _ in range(units + 1)]
        kept[0] = [begin]
        for used in range(units + 1):
            left = (units - used) * self._unit_size[frame.level] * frame.outer
            rows = self._prune(join(kept[used]), left + frame.elsewhere, frame)
            laid = rows[:, FIRST] < starts[rows[:, ORIGIN], FIRST]
            if laid.any():
                yield rows[laid]
            if used == units or not len(rows):
                continue
            if self._leaves_idle:
                kept[used + 1].append(rows)
            # A cut of this level before the next part; the starts were cut on an outer one.
            narrow = self.costs.width_bytes[rows[:, FIRST]] <= frame.widths[0, rows[:, ORIGIN]]
            ready = rows[(narrow | ~laid) & (rows[:, FIRST] > frame.at_least[rows[:, ORIGIN]])]
            if not len(ready):
                continue
            begun = starts[ready[:, ORIGIN], FIRST] > ready[:, FIRST]
            numbers = np.full(len(ready), NOTHING)
            numbers[begun] = self._trail.add(ready[begun])
            for m, more in self._parts(ready, numbers, used, frame):
                kept[used + m].append(more)

    def _prune(self, rows: Rows, num_workers: int, frame: _Frame) -> Rows:
        """The rows worth going on with, on `num_workers` that are left."""
        if math.isfinite(self._limit_s):  # what is left to do must fit into the time of those
            most_s = self._limit_s * num_workers * (1 + 1e-9)
            rows = rows[self.costs.compute_s[rows[:, FIRST]] <= most_s]
        if self.wish.num_stages is None:
            burden = self.burden_rank[rows[:, FIRST]]
            return worth_keeping(rows, burden, self.levels(rows[:, FIRST], rows[:, ORIGIN], frame))
        left = self.wish.num_stages - rows[:, COUNT]
        hopeful = np.where(left == 0, rows[:, FIRST] == 0, rows[:, FIRST] >= left)
        return one_of_each(rows[hopeful & (left >= 0)])

    def _parts(
        self, ready: Rows, numbers: np.ndarray, used: int, frame: _Frame
    ) -> Iterator[tuple[int, Rows]]:
        """One part more before each row, for each number of units; `numbers` are the rows' own."""
        free = self.costs.topology.levels[frame.level].num_units - used
        replicas = range(1, 2 if self.wish.straight else free + 1)
        if frame.level == 0:
            yield from self._stages(ready, numbers, replicas, free, frame)
            return
        for m in replicas:
            lay = self._nested if self.costs.cost.overlap else self._nested_sum
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
        self, m: int, unit: int, frame: _Frame, limit_s: Any, at_least: Any, origin: Any
    ) -> _Frame:
        """The frame of a pipeline on the units inside of `m` units of `frame`."""
        each = np.broadcast_to(np.asarray(limit_s, float), (len(origin),))
        widths = self._widths(each, frame.level - 1, frame.widths[:, origin])
        bases = self.costs.units(frame.level, unit, m, frame.bases)
        left = frame.elsewhere + unit * self._unit_size[frame.level] * frame.outer
        return _Frame(frame.level - 1, frame.outer * m, bases, left, limit_s, at_least, widths)

    def _nested(
        self, ready: Rows, m: int, unit: int, frame: _Frame
    ) -> Iterator[tuple[Rows, np.ndarray]]:
        """Pipelines inside `m` units, and for each the row that it goes on from."""
        origin, stop = ready[:, ORIGIN], ready[:, FIRST]
        limit_s = frame.limit_of(origin) * m
        params = self.costs.param_bytes
        each = self._sync(m, frame.level, frame.outer)
        synced = _first_true(lambda i: each * (params[stop] - params[i]) <= limit_s, stop)
        at_least = np.maximum(synced, frame.at_least[origin])
        inside = self._inside(m, unit, frame, limit_s, at_least, origin)
        starts = ready.copy()
        starts[:, PARENT] = starts[:, INNER] = NOTHING
        for rows in self._pipeline(starts, inside):
            yield rows, rows[:, ORIGIN]

    def _nested_sum(
        self, ready: Rows, m: int, unit: int, frame: _Frame
    ) -> Iterator[tuple[Rows, np.ndarray]]:
        """The same where the all-reduce is added: how much is left depends on where it begins.

        So every first layer is tried, with the time that its parameters leave.
        """
        index, first = _every_first(frame.at_least[ready[:, ORIGIN]], ready[:, FIRST])
        origin, stop = ready[index, ORIGIN], ready[index, FIRST]
        params = self.costs.param_bytes
        left = frame.limit_of(origin) * m - self._sync(m, frame.level, frame.outer) * (
            params[stop] - params[first]
        )
        possible = left >= 0
        index, first, origin, left = (
            index[possible],
            first[possible],
            origin[possible],
            left[possible],
        )
        inside = self._inside(m, unit, frame, left, first, origin)
        starts = ready[index]
        starts[:, PARENT] = starts[:, INNER] = NOTHING
        for rows in self._pipeline(starts, inside):
            exact = rows[rows[:, FIRST] == first[rows[:, ORIGIN]]]
            yield exact, index[exact[:, ORIGIN]]

    def _sync(self, m: int, level: int, outer: int) -> float:
        bandwidth = self.costs.topology.levels[level].bandwidth_bytes_per_s
        return self.costs.cost.sync_s_per_byte(m, bandwidth, outer)

    # -------- stages

    def _stages(
        self, ready: Rows, numbers: np.ndarray, replicas: range, free: int, frame: _Frame
    ) -> Iterator[tuple[int, Rows]]:
        for m in replicas:
            workers = self.costs.units(0, free - m, m, frame.bases)
            stage = _StageLaying(self, ready, m, workers, frame)
            rows = stage.narrowing() if self.wish.num_stages is None else stage.everywhere()
            for index, first, remat in rows:
                more = make_rows(
                    len(index),
                    origin=ready[index, ORIGIN],
                    first=first,
                    demand=stage.demand[index],
                    count=ready[index, COUNT] + (self.wish.num_stages is not None),
                    parent=numbers[index],
                    stop=ready[index, FIRST],
                    replicas=m,
                    unit=free - m,
                    remat=remat,
                    inner=NOTHING,
                )
                yield m, more

    def within(self, m: int, outer: int, stop: np.ndarray, limit_s: Any, remat: bool) -> np.ndarray:
        """For each stop the first layer from which a stage on `m` workers is quick enough."""
        if isinstance(limit_s, np.ndarray):
            return self._search_within(m, outer, stop, limit_s, remat)
        key = limit_s, m, outer, remat
        if key not in self._within:
            every = np.arange(self.costs.num_layers + 1)
            self._within[key] = self._search_within(m, outer, every, limit_s, remat)
        return self._within[key][stop]

    def _search_within(
        self, m: int, outer: int, stop: np.ndarray, limit_s: float | np.ndarray, remat: bool
    ) -> np.ndarray:
        costs, each = self.costs, self._sync(m, 0, outer)
        params = costs.param_bytes

        def quick(first: np.ndarray) -> np.ndarray:
            work = costs.work_s(first, stop, remat)
            sync = each * (params[stop] - params[first])
            together = np.maximum(work, sync) if costs.cost.overlap else work + sync
            return together <= limit_s * m

        return _first_true(quick, stop)


class _StageLaying:
    """One stage more before each of some rows, on `m` units whose parts are workers."""

    def __init__(
        self, laying: Laying, ready: Rows, m: int, workers: tuple[int, ...], frame: _Frame
    ) -> None:
        self.laying, self.costs = laying, laying.costs
        self.origin, self.stop = ready[:, ORIGIN], ready[:, FIRST]
        self.outer, self.replicas = frame.outer, len(workers)
        self._most_levels = len(frame.widths)
        self.limit_bytes = self.costs.limit_bytes(workers) + laying.wish.extra_bytes
        self.charged = laying.wish.charges_memory and not np.isinf(self.limit_bytes)
        self.warm_up = -(-ready[:, DEMAND] // self.replicas)
        self.demand = self.replicas * (self.warm_up + 1)
        if not laying.wish.charges_memory:
            self.demand = np.zeros_like(self.demand)
        limit_s = frame.limit_of(self.origin)
        self.frame = frame
        self.lowest = {
            remat: self._lowest(m, limit_s, remat, frame.at_least[self.origin])
            for remat in ((False, True) if self.charged and self.costs.memory.remat else (False,))
        }

    def _lowest(
        self, m: int, limit_s: float | np.ndarray, remat: bool, at_least: np.ndarray
    ) -> np.ndarray:
        """For each row a first layer before which the stage cannot begin."""
        lowest = np.maximum(self.laying.within(m, self.outer, self.stop, limit_s, remat), at_least)
        if self.charged:
            for warm_up in np.unique(self.warm_up):
                mine = self.warm_up == warm_up
                table = self.laying.tables.fitting(self.limit_bytes, int(warm_up), remat)
                lowest[mine] = np.maximum(lowest[mine], table[self.stop[mine]])
        return lowest

    def _fits(self, index: np.ndarray, first: np.ndarray, remat: bool) -> np.ndarray:
        if not self.charged:
            return np.ones(len(first), bool)
        needed = self.costs.bytes_of(first, self.stop[index], self.warm_up[index], remat)
        return needed <= self.limit_bytes

    def _first_fitting(self, remat: bool) -> np.ndarray:
        """For each row the first layer that the stage may begin with, for all but its cut."""
        first = self.lowest[remat].copy()
        open_ = np.flatnonzero(first < self.stop)
        while len(open_):
            open_ = open_[~self._fits(open_, first[open_], remat)]
            first[open_] += 1
            open_ = open_[first[open_] < self.stop[open_]]
        return first

    def narrowing(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each row the longest stage, and shorter ones only where the cut is narrower.

        Yields indices of rows, the first layers, and whether the forward pass is repeated.
        """
        first = self._first_fitting(False)
        remat = np.zeros(len(first), bool)
        if True in self.lowest:
            other = self._first_fitting(True)
            remat, first = other < first, np.minimum(first, other)
        index = np.flatnonzero(first < self.stop)
        first, remat = first[index], remat[index]
        before, lightest = np.zeros_like(first), np.full_like(first, self.costs.num_layers + 1)
        while len(index):
            levels = self.laying.levels(first, self.origin[index], self.frame)
            burden = self.laying.burden_rank[first]
            better = (levels > before) | ((levels > 0) & (burden < lightest))
            if better.any():
                yield index[better], first[better], remat[better]
            before = np.maximum(before, levels)
            lightest = np.where(better, np.minimum(lightest, burden), lightest)
            # A wider cut further on is worse in every way.
            first = self.laying.tables.narrower[first]
            left = (first < self.stop[index]) & ((before < self._most_levels) | (lightest > 0))
            index, first, remat = index[left], first[left], remat[left]
            before, lightest = before[left], lightest[left]

    def everywhere(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each row all first layers that the stage may begin with."""
        lowest = np.minimum.reduce(list(self.lowest.values()))
        index, first = _every_first(lowest, self.stop)
        allowed = self.laying.levels(first, self.origin[index], self.frame) > 0
        index, first = index[allowed], first[allowed]
        plain = (first >= self.lowest[False][index]) & self._fits(index, first, False)
        possible = plain
        if True in self.lowest:
            again = (first >= self.lowest[True][index]) & self._fits(index, first, True)
            possible = plain | again
        yield index[possible], first[possible], ~plain[possible]


def _burden_rank(costs: Costs) -> np.ndarray:
    """For each layer what a cut before it leaves to the stage before, as a rank.

    That stage keeps the weights and the stash of the layers up to the cut, at the least once each,
    and buffers for the cut. The fewer layers, the less; but the cut may be wide.
    """
    memory = costs.memory
    times = 1 if memory.remat else memory.in_flight(0)
    burden = memory.param_copies(0) * costs.param_bytes + times * costs.stash_bytes
    if memory.buffers:
        burden = burden + 2 * costs.width_bytes
    return np.unique(burden, return_inverse=True)[1]


def _first_true(holds: Any, stop: np.ndarray) -> np.ndarray:
    """For each stop the first layer at which `holds`, which then holds up to the stop."""
    low, high = np.zeros_like(stop), stop.copy()
    while (low < high).any():
        middle = (low + high) // 2
        good = holds(middle)
        high = np.where(good, middle, high)
        low = np.where(good, low, np.minimum(middle + 1, high))
    return high


def _every_first(lowest: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a row's index and a first layer from `lowest` on, before its stop."""
    counts = np.maximum(stop - lowest, 0)
    index = np.repeat(np.arange(len(stop)), counts)
    begin = np.cumsum(counts) - counts
    return index, lowest[index] + np.arange(counts.sum()) - begin[index]


def _next_narrower(width: np.ndarray) -> np.ndarray:
    """For each layer the next one with a narrower cut before it; the end if there is none."""
    count = len(width)
    following = np.full(count, count - 1)
    waiting: list[int] = []
    for at in range(count):
        while waiting and width[at] < width[waiting[-1]]:
            following[waiting.pop()] = at
        waiting.append(at)
    return following
