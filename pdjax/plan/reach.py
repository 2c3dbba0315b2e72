"""How far pipelines reach in a given time, with memory left out.

Without memory, one number says all about a partial plan: its first layer. The smaller, the better,
whatever comes before. The recurrence of SOSP 2019 (section 3.1) then becomes, for a time T,

    first[k] = min over m ≤ k of least(open[k - m], m)     on k units, m of them of the first part
    open[k]  = the next layer, from first[k] on, before which a cut takes at most T

`least(stop, m)` is the smallest first layer of a part that ends at `stop` and takes at most T on m
units. On the innermost level it is looked up in sums over the layers. On an outer level the part is
a pipeline inside each unit. That pipeline has the time T m if the all-reduce overlaps. Otherwise it
has T m minus the all-reduce, which depends on the first layer itself; the first layer is then
searched for. What one first layer leaves time for, all later ones do, too.

Nothing here imports JAX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdjax.plan.cost_model import Costs, Part
from pdjax.plan.sums import Sums, next_narrower, part_sums

_ROUNDING = 1e-13  # share of the limit by which a plan may exceed it
_BOUND_ROUNDING = 1e-9  # share of a limit by which a bound is too generous
_AT_ONCE = 96  # first layers tried together; so many take little longer than one


@dataclass(frozen=True)
class Reached:
    """Pipelines on up to all units of a level, a column for each; shapes (units + 1, columns).

    Attributes:
        first: the smallest first layer on 0, 1, … units.
        open: the same where another part may be put before it.
        replicas: units of the part that begins there; 0 where one more unit is of no use.
    """

    first: np.ndarray
    open: np.ndarray
    replicas: np.ndarray


class Reach:
    """How far pipelines reach, from the last layer to the front.

    Args:
        costs: the layers and the workers.
        replicate: whether stages may be replicated.
        mirrored: whether to take the layers in reverse order. What is reached then says how far
            pipelines reach from the first layer to the back.

    Attributes:
        count: number of pipelines laid so far, a measure of the work.
    """

    def __init__(self, costs: Costs, *, replicate: bool = True, mirrored: bool = False) -> None:
        self.costs, self.replicate, self.count = costs, replicate, 0
        self._remat = costs.memory.remat == "full"
        self._mirrored = mirrored
        params = costs.param_bytes
        self._param_bytes = params[-1] - params[::-1] if mirrored else params
        self._width_bytes = costs.width_bytes[:: -1 if mirrored else 1]
        self._narrower = next_narrower(self._width_bytes)
        self._num_units = [level.num_units for level in costs.topology.levels]
        self._rounds = costs.cost.num_microbatches is not None
        self._tables: dict[tuple[int, int], Sums] = {}

    def plan(self, limit_s: float) -> tuple[Part, ...] | None:
        """A plan that takes at most `limit_s`, give or take rounding; None if there is none."""
        limit_s *= 1 + _ROUNDING
        if self.reached(limit_s)[-1] > 0:
            return None
        return self._parts(len(self._num_units) - 1, 0, self.costs.num_layers, limit_s, 1)

    def reached(self, limit_s: float) -> np.ndarray:
        """The smallest first layer of plans on 0, 1, … outermost units."""
        top = len(self._num_units) - 1
        return self._one(top, self.costs.num_layers, limit_s, 1).first[:, 0]

    def _one(self, level: int, stop: int, limit_s: float, outer: int) -> Reached:
        return self.pipelines(level, np.array([stop]), np.array([limit_s]), np.array([outer]))

    def _parts(
        self, level: int, first: int, stop: int, limit_s: float, outer: int
    ) -> tuple[Part, ...]:
        """The parts of one pipeline, on the last units, and on as few of them as suffice."""
        found = self._one(level, stop, limit_s, outer)
        parts = []
        while first < stop:
            used = int(np.argmax(found.first[:, 0] <= first))
            m = int(found.replicas[used, 0])
            end = int(found.open[used - m, 0])
            inner = ()
            if level:
                inside_s = float(self._inside_s(level, m, first, end, limit_s, outer))
                inner = self._parts(level - 1, first, end, inside_s, outer * m)
            unit = self._num_units[level] - used
            parts.append(Part(first, end, m, unit, inner, self._remat and not inner))
            first = end
        return tuple(parts)

    # -------- pipelines

    def pipelines(
        self, level: int, stop: np.ndarray, limit_s: np.ndarray, outer: np.ndarray
    ) -> Reached:
        """Pipelines on the units of a level; all arguments but `level` have an item for each.

        Args:
            level: of the units.
            stop: the layer after the last.
            limit_s: seconds that the pipeline may take.
            outer: how often it is replicated on outer levels.
        """
        shape = self._num_units[level] + 1, len(stop)
        if not self._rounds:  # then it does not matter how often
            return self._pipelines(level, stop, limit_s, 1)
        found = Reached(*np.zeros((3, *shape), np.int64))
        for count in np.unique(outer):
            mine = outer == count
            some = self._pipelines(level, stop[mine], limit_s[mine], int(count))
            for name in ("first", "open", "replicas"):
                getattr(found, name)[:, mine] = getattr(some, name)
        return found

    def _pipelines(self, level: int, stop: np.ndarray, limit_s: np.ndarray, outer: int) -> Reached:
        self.count += len(stop)
        units = self._num_units[level]
        first, open_ = np.tile(stop, (2, units + 1, 1))
        replicas = np.zeros_like(first)
        widest = self._widest(level, limit_s)
        extend = self._nested if level else self._stages
        for used in range(1, units + 1):
            most = used if self.replicate else 1
            stops = open_[used - most : used][::-1]
            first[used], replicas[used] = extend(level, stops, limit_s, outer, first[used - 1])
            if not first[used].any():
                first[used:], open_[used:] = 0, 0
                break
            open_[used] = np.minimum(self._next_open(first[used], widest), stop)
        return Reached(first, open_, replicas)

    def _widest(self, level: int, limit_s: np.ndarray) -> np.ndarray:
        """The widest cuts that take at most the time."""
        most = np.finfo(float).max  # below the infinite width of a cut that is not allowed
        if not self.costs.cost.activations:
            return np.full(len(limit_s), most)
        bandwidth = self.costs.topology.levels[level].bandwidth_bytes_per_s
        return np.minimum(limit_s * bandwidth / 2, most)

    def _next_open(self, first: np.ndarray, widest: np.ndarray) -> np.ndarray:
        """The next layers, from some on, before which cuts are narrow enough."""
        at = first.copy()
        wide = np.flatnonzero(self._width_bytes[at] > widest)
        while len(wide):
            at[wide] = self._narrower[at[wide]]
            wide = wide[self._width_bytes[at[wide]] > widest[wide]]
        return at

    # -------- one part more: `stops` are where it ends if it has 1, 2, … units

    def _stages(
        self, level: int, stops: np.ndarray, limit_s: np.ndarray, outer: int, least: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Stages: the smallest first layers, and units; these are 0 where `least` stays."""
        sums = self._sums(level, outer)
        alone = sums.first(1, stops[0], limit_s)
        best, replicas = np.minimum(alone, least), (alone < least).astype(np.int64)
        m = np.arange(2, len(stops) + 1)[:, None]
        before = np.maximum(best - 1, 0)
        better = (best > 0) & sums.quick(m, before, stops[1:], limit_s * m)
        for row in np.flatnonzero(better.any(axis=1)).tolist():
            mine = np.flatnonzero(better[row])
            found = sums.first(row + 2, stops[row + 1, mine], limit_s[mine] * (row + 2))
            improved = found < best[mine]
            best[mine[improved]], replicas[mine[improved]] = found[improved], row + 2
        return best, replicas

    def _nested(
        self, level: int, stops: np.ndarray, limit_s: np.ndarray, outer: int, least: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same for parts that are pipelines inside each unit."""
        overlap = self.costs.cost.overlap
        some = stops if overlap else stops[:1]  # those with a limit that does not depend on them
        row, column = np.indices(some.shape).reshape(2, -1)
        m, stop = row + 1, some.ravel()
        found = self._inside(level, m, stop, limit_s[column] * m, outer).reshape(some.shape)
        if overlap:
            sums = self._sums(level, outer)
            synced = [sums.first(at + 1, s, limit_s * (at + 1)) for at, s in enumerate(stops)]
            found = np.maximum(found, synced)
        best = np.minimum(found.min(axis=0), least)
        replicas = np.where(best < least, found.argmin(axis=0) + 1, 0)
        if len(stops) > len(some):
            self._search(level, stops, limit_s, outer, best, replicas)
        return best, replicas

    def _inside(
        self, level: int, m: np.ndarray, stop: np.ndarray, inside_s: np.ndarray, outer: int
    ) -> np.ndarray:
        """How far pipelines on all units inside each of m units reach."""
        return self.pipelines(level - 1, stop, inside_s, outer * m).first[-1]

    def _search(
        self,
        level: int,
        stops: np.ndarray,
        limit_s: np.ndarray,
        outer: int,
        best: np.ndarray,
        replicas: np.ndarray,
    ) -> None:
        """Improves `best` by replicated parts whose all-reduce is added.

        1. Bound each part's first layer from below: the workers have no more than all their time.
        2. Drop the parts that are too slow one layer before the best first layer.
        3. Try several layers between both bounds of each part, drop the parts whose lower bound
           does not beat the best, and again, until none is left.
        """
        row, column = np.indices(stops.shape)[:, 1:].reshape(2, -1)
        m, stop = row + 1, stops[1:].ravel()
        low = self._bounds(level, stops, limit_s, outer).ravel()
        high = best[column]

        def attempt(part: np.ndarray, at: np.ndarray) -> np.ndarray:
            """What the pipelines reach that have the time that a first layer leaves."""
            most = limit_s[column[part]]
            inside_s = self._inside_s(level, m[part], at, stop[part], most, outer)
            return self._inside(level, m[part], stop[part], inside_s, outer)

        def improve(parts: np.ndarray) -> None:
            parts = parts[np.argsort(-high[parts])]  # of one column, the last one stays
            parts = parts[high[parts] < best[column[parts]]]
            best[column[parts]], replicas[column[parts]] = high[parts], m[parts]

        parts = np.flatnonzero(low < high)
        if len(parts):
            reached = attempt(parts, high[parts] - 1)
            parts = parts[reached <= high[parts] - 1]
            high[parts] -= 1
            improve(parts)
        while len(parts := parts[low[parts] < best[column[parts]]]):
            tries = int(min(max(1, _AT_ONCE // len(parts)), (high - low)[parts].max()))
            share = np.arange(tries) / tries
            at = low[parts, None] + ((high - low)[parts, None] * share).astype(np.int64)
            part = np.repeat(parts, tries)
            reached = attempt(part, at.ravel()).reshape(at.shape)
            good = reached <= at
            # What is reached from a layer that is too early is late enough.
            high[parts] = np.minimum(high[parts], np.where(good, at, reached).min(axis=1))
            low[parts] = np.where(good, low[parts, None], at + 1).max(axis=1)
            improve(parts)

    def _inside_s(self, level: int, m: Any, first: Any, stop: Any, limit_s: Any, outer: int) -> Any:
        """Seconds that pipelines inside m units may take; numbers or arrays."""
        if self.costs.cost.overlap:
            return limit_s * m
        each = self.costs.sync_s_per_byte(m, level, outer)
        return limit_s * m - each * (self._param_bytes[stop] - self._param_bytes[first])

    def _bounds(self, level: int, stops: np.ndarray, limit_s: np.ndarray, outer: int) -> np.ndarray:
        """For parts of 2, 3, … units, first layers that they do not get before."""
        sums, inside = self._sums(level, outer), math.prod(self._num_units[:level])
        most = limit_s * inside * (1 + _BOUND_ROUNDING)
        return np.array([sums.first(m, stops[m - 1], most * m) for m in range(2, len(stops) + 1)])

    def _sums(self, level: int, outer: int) -> Sums:
        if (level, outer) not in self._tables:
            self._tables[level, outer] = part_sums(
                self.costs, level, outer, self._remat, mirrored=self._mirrored
            )
        return self._tables[level, outer]
