"""The fastest plan that fits: PipeDream's planner, exact, with memory charged in full.

The time of a plan is that of its slowest part (SOSP 2019, section 3.1). Whether some plan takes at
most a given time T is easy to say: stages are laid from the last layer to the first, each as long
as T and the memory of its workers allow, for every number of workers. A stage that reaches further
back is always at least as good, as what is left is then less; so of everything that can be laid
on the last u units only the shortest rests are kept, one for each count of microbatches that the
stages so far want in flight. The best time is found by bisection, and ends at a plan whose own time
nothing beats.

Levels are handled alike: a part of an outer level is a pipeline of its own on the units inside,
replicated m times; only such nested plans are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pdjax.profile import Profile
from pdjax.topology import Topology

Sync = Literal["ring", "paper", "original"]
"""Bytes that an all-reduce over m replicas sends for each byte of parameters: ``"ring"``
2 (m - 1) / m, ``"paper"`` 2 (m - 1) (the formula of SOSP 2019), ``"original"`` 4 (m - 1) / m (what
its code does)."""


@dataclass(frozen=True)
class CostForm:
    """How the parts of a stage's time are put together.

    Attributes:
        overlap: whether computing and synchronising overlap, so that the longer one counts (the
            paper), or follow each other, so that their sum does (the original's code).
        sync: what an all-reduce sends.
        activations: whether the transfer of activations is charged (the original's code leaves it
            out unless asked).
    """

    overlap: bool = True
    sync: Sync = "ring"
    activations: bool = True

    def sync_s_per_byte(self, num_replicas: int, bandwidth_bytes_per_s: float) -> float:
        """Seconds to synchronise each byte of parameters over `num_replicas`."""
        m = num_replicas
        factor = {"ring": 2 * (m - 1) / m, "paper": 2 * (m - 1), "original": 4 * (m - 1) / m}
        return factor[self.sync] / bandwidth_bytes_per_s

    def stage_s(self, inner_s: float, sync_s: float, num_replicas: int) -> float:
        """Seconds for each minibatch of what takes `inner_s` on one of its replicas."""
        together = max(inner_s, sync_s) if self.overlap else inner_s + sync_s
        return together / num_replicas


@dataclass(frozen=True)
class MemoryForm:
    """What a worker keeps, in bytes.

    Attributes:
        stashes: whether a version of the weights is kept for each microbatch in flight (weight
            stashing), or one for all.
        optimizer_bytes_per_param_byte: size of the optimizer state: 2 for Adam, 0 for plain SGD.
    """

    stashes: bool = True
    optimizer_bytes_per_param_byte: float = 2.0

    def factors(self, warm_up: int) -> tuple[float, float]:
        """How often a stage's parameters, and its stash of one microbatch, are kept at its peak.

        Versions of the weights, the optimizer state and the gradients; the stash of each microbatch
        in flight.

        Args:
            warm_up: forward passes of the stage before its first backward pass.
        """
        versions = warm_up + 1 if self.stashes else 1
        return versions + 1 + self.optimizer_bytes_per_param_byte, warm_up + 1


@dataclass(frozen=True)
class Part:
    """A run of layers on some units of a level.

    Attributes:
        first: its first layer.
        stop: the layer after its last.
        replicas: on how many units it is replicated.
        unit: the first of these units, by its number on its level.
        inner: the parts that it consists of on one of these units, in order; empty if the unit is
            a worker.
    """

    first: int
    stop: int
    replicas: int
    unit: int
    inner: tuple[Part, ...] = ()


@dataclass(frozen=True)
class PlacedStage:
    """A stage of a nested plan.

    Attributes:
        first: its first layer.
        stop: the layer after its last.
        replicas: number of its workers.
        warm_up: forward passes of each worker before its first backward pass.
        workers: the workers, in topology order.
    """

    first: int
    stop: int
    replicas: int
    warm_up: int
    workers: tuple[int, ...]


class Costs:
    """The times and bytes of runs of layers, and of plans made of them.

    Args:
        profile: the layers.
        topology: the workers.
        cost: how times are put together.
        memory: what a worker keeps.
    """

    def __init__(
        self, profile: Profile, topology: Topology, cost: CostForm, memory: MemoryForm
    ) -> None:
        self.topology, self.cost, self.memory = topology, cost, memory
        self.compute_s = _sums(profile.column("compute_s"))
        self.param_bytes = _sums(profile.column("param_bytes"))
        self.stash_bytes = _sums(profile.column("stash_bytes"))
        self.cut_bytes = np.asarray(profile.column("cut_bytes"), float)
        self.num_layers = len(profile.layers)

    def cut_s(self, at: int, level: int) -> float:
        """Seconds for each minibatch to send what crosses the cut before layer `at`, both ways."""
        if not self.cost.activations:
            return 0.0
        bandwidth = self.topology.levels[level].bandwidth_bytes_per_s
        return 2 * float(self.cut_bytes[at - 1]) / bandwidth

    def plan_s(self, parts: tuple[Part, ...], level: int | None = None) -> float:
        """Seconds for each minibatch of a pipeline of `parts`: those of its slowest part or cut."""
        level = len(self.topology.levels) - 1 if level is None else level
        cuts = [self.cut_s(part.first, level) for part in parts[1:]]
        return max([*cuts, *(self._part_s(part, level) for part in parts)])

    def _part_s(self, part: Part, level: int) -> float:
        if part.inner:
            inner = self.plan_s(part.inner, level - 1)
        else:
            inner = float(self.compute_s[part.stop] - self.compute_s[part.first])
        bandwidth = self.topology.levels[level].bandwidth_bytes_per_s
        each = self.cost.sync_s_per_byte(part.replicas, bandwidth)
        sync = each * float(self.param_bytes[part.stop] - self.param_bytes[part.first])
        return self.cost.stage_s(inner, sync, part.replicas)

    def stages(self, parts: tuple[Part, ...]) -> tuple[PlacedStage, ...]:
        """The stages of a plan, in order, with their workers and warm-up counts.

        The number of warm-up passes is the smallest that keeps every stage busy: 0 on the last
        stage, before it ``ceil(r_next (w_next + 1) / r)``.
        """
        placed: list[PlacedStage] = []
        demand = 0
        for part, replicas, workers in reversed(list(self._leaves(parts))):
            warm_up = -(-demand // replicas)
            demand = replicas * (warm_up + 1)
            placed.append(PlacedStage(part.first, part.stop, replicas, warm_up, workers))
        return tuple(reversed(placed))

    def _leaves(
        self, parts: tuple[Part, ...], level: int | None = None, bases: tuple[int, ...] = (0,)
    ) -> Iterator[tuple[Part, int, tuple[int, ...]]]:
        level = len(self.topology.levels) - 1 if level is None else level
        size = math.prod(inner.num_units for inner in self.topology.levels[:level])
        for part in parts:
            units = range(part.unit, part.unit + part.replicas)
            mine = [base + size * unit for unit in units for base in bases]
            if part.inner:
                yield from self._leaves(part.inner, level - 1, tuple(sorted(mine)))
            else:
                yield part, len(mine), tuple(sorted(mine))

    def stage_bytes(self, stage: PlacedStage) -> float:
        """Peak bytes of each worker of a stage."""
        of_params, of_stash = self.memory.factors(stage.warm_up)
        param_bytes = float(self.param_bytes[stage.stop] - self.param_bytes[stage.first])
        stash_bytes = float(self.stash_bytes[stage.stop] - self.stash_bytes[stage.first])
        return of_params * param_bytes + of_stash * stash_bytes

    def limit_bytes(self, workers: tuple[int, ...]) -> float:
        """The smallest memory among `workers`."""
        sizes = self.topology.memory_bytes
        return min(sizes[worker] for worker in workers) if sizes else math.inf

    def excess_bytes(self, parts: tuple[Part, ...]) -> float:
        """By how much the plan exceeds the memory of its worst-off worker; 0 if it fits."""
        return max(
            max(0.0, self.stage_bytes(stage) - self.limit_bytes(stage.workers))
            for stage in self.stages(parts)
        )


def _sums(values: object) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.asarray(values, float))])


@dataclass(frozen=True)
class _Laid:
    """What was laid on some units: everything from layer `first` on.

    Attributes:
        first: the first layer that was laid.
        demand: microbatches that the stages so far want in flight together.
        parts: the parts on this level, the first one first.
    """

    first: int
    demand: int
    parts: tuple[Part, ...]


def fastest(costs: Costs, *, straight: bool = False) -> tuple[Part, ...] | None:
    """The nested plan with the smallest time that fits, or None if none fits.

    Args:
        costs: the layers and the workers.
        straight: whether to replicate nothing.
    """
    best = _bisect(costs, straight, charges_memory=False)
    if best is None or costs.excess_bytes(best) > 0:
        best = _bisect(costs, straight, charges_memory=True)
    return best


def _bisect(costs: Costs, straight: bool, charges_memory: bool) -> tuple[Part, ...] | None:
    best = _Search(costs, math.inf, straight, charges_memory).run()
    if best is None:
        return None
    low, high = 0.0, costs.plan_s(best)
    while low < high * (1 - 1e-12):
        middle = (low + high) / 2 if low > high / 4 else high / 2
        found = _Search(costs, middle, straight, charges_memory).run()
        if found is None:
            low = middle
            if high - low <= high * 1e-9:
                break
        else:
            best, high = found, costs.plan_s(found)
    return best


class _Search:
    """Looks for a plan that takes at most `limit_s`."""

    def __init__(self, costs: Costs, limit_s: float, straight: bool, charges_memory: bool) -> None:
        self.costs, self.limit_s, self.straight = costs, limit_s, straight
        self.charges_memory = charges_memory
        # Where all workers are alike, those that a plan does not need may as well be the first.
        self.leaves_idle = len(set(costs.topology.memory_bytes)) > 1
        self._next: dict[tuple[int, float], np.ndarray] = {}

    def run(self) -> tuple[Part, ...] | None:
        top = len(self.costs.topology.levels) - 1
        start = _Laid(self.costs.num_layers, 0, ())
        for laid in self._pipeline(top, start, self.limit_s, (0,)):
            if laid.first == 0:
                return laid.parts
        return None

    def _pipeline(
        self, level: int, start: _Laid, limit_s: float, bases: tuple[int, ...]
    ) -> list[_Laid]:
        """All that is worth laying on the units of one level before `start`."""
        units = self.costs.topology.levels[level].num_units
        following = self._next_cut(level, limit_s)
        kept: list[list[_Laid]] = [[] for _ in range(units + 1)]
        kept[0] = [start]
        found: list[_Laid] = []
        for used in range(units):
            worth = _undominated(kept[used])
            if self.leaves_idle:
                kept[used + 1] += worth
            for laid in worth:
                before = laid
                if laid is not start:
                    before = self._cut_at(laid, int(following[laid.first]))
                if before is None or before.first == 0:
                    continue
                for m in range(1, 2 if self.straight else units - used + 1):
                    for more in self._part(level, before, used, m, limit_s, bases):
                        kept[used + m].append(more)
                        found.append(more)
        return _undominated(found)

    def _cut_at(self, laid: _Laid, first: int) -> _Laid | None:
        """`laid` without the layers before `first`; None if that leaves nothing."""
        if first == laid.first:
            return laid
        parts = _shorten(laid.parts, first)
        return _Laid(first, laid.demand, parts) if parts else None

    def _part(
        self,
        level: int,
        before: _Laid,
        used: int,
        m: int,
        limit_s: float,
        bases: tuple[int, ...],
    ) -> list[_Laid]:
        """What can be laid as one part on `m` units before `before`."""
        costs = self.costs
        units = costs.topology.levels[level].num_units
        size = math.prod(inner.num_units for inner in costs.topology.levels[:level])
        first_unit = units - used - m
        mine = tuple(base + size * (first_unit + k) for k in range(m) for base in bases)
        stop = before.first
        bandwidth = costs.topology.levels[level].bandwidth_bytes_per_s
        sync = costs.cost.sync_s_per_byte(m, bandwidth)
        if level == 0:
            return self._stage(before, m, first_unit, mine, limit_s * m, sync)
        assert costs.cost.overlap, "only overlapping costs on several levels"
        first = _first_within(costs.param_bytes * sync, stop, limit_s * m)
        inner = _Laid(stop, before.demand, ())
        found = []
        for laid in self._pipeline(level - 1, inner, limit_s * m, mine):
            fitted = laid if laid.first >= first else self._cut_at(laid, first)
            if fitted is not None:
                part = Part(fitted.first, stop, m, first_unit, fitted.parts)
                found.append(_Laid(fitted.first, laid.demand, (part, *before.parts)))
        return found

    def _stage(
        self,
        before: _Laid,
        m: int,
        unit: int,
        workers: tuple[int, ...],
        limit_s: float,
        sync: float,
    ) -> list[_Laid]:
        costs, stop = self.costs, before.first
        replicas = len(workers)
        warm_up = -(-before.demand // replicas)
        seconds = costs.compute_s, costs.param_bytes * sync
        if costs.cost.overlap:
            first = max(_first_within(series, stop, limit_s) for series in seconds)
        else:
            first = _first_within(seconds[0] + seconds[1], stop, limit_s)
        if self.charges_memory:
            of_params, of_stash = costs.memory.factors(warm_up)
            kept = of_params * costs.param_bytes + of_stash * costs.stash_bytes
            first = max(first, _first_within(kept, stop, costs.limit_bytes(workers)))
        if first >= stop:
            return []
        part = Part(first, stop, m, unit)
        demand = replicas * (warm_up + 1) if self.charges_memory else 0
        return [_Laid(first, demand, (part, *before.parts))]

    def _next_cut(self, level: int, limit_s: float) -> np.ndarray:
        """For each layer the first one from it on before which a cut is quick enough."""
        key = level, limit_s
        if key not in self._next:
            count = self.costs.num_layers
            allowed = np.ones(count + 1, bool)
            if self.costs.cost.activations:
                bandwidth = self.costs.topology.levels[level].bandwidth_bytes_per_s
                allowed[1:] = 2 * self.costs.cut_bytes / bandwidth <= limit_s
            places = np.where(allowed, np.arange(count + 1), count)
            self._next[key] = np.minimum.accumulate(places[::-1])[::-1]
        return self._next[key]


def _first_within(series: np.ndarray, stop: int, limit: float) -> int:
    """The first layer from which on to `stop` a quantity (given by its sums) is within `limit`."""
    if math.isinf(limit):
        return 0
    first = int(np.searchsorted(series[: stop + 1], series[stop] - limit, side="left"))
    while first < stop and series[stop] - series[first] > limit:  # rounding in the sums
        first += 1
    return first


def _shorten(parts: tuple[Part, ...], first: int) -> tuple[Part, ...]:
    """`parts` without the layers before `first`."""
    left = [part for part in parts if part.stop > first]
    if left:
        inner = _shorten(left[0].inner, first)
        left[0] = replace(left[0], first=max(first, left[0].first), inner=inner)
    return tuple(left)


def _undominated(laid: list[_Laid]) -> list[_Laid]:
    """Without those that another one beats in both the first layer and the demand."""
    kept: list[_Laid] = []
    for one in sorted(laid, key=lambda each: (each.first, each.demand)):
        if not kept or one.demand < kept[-1].demand:
            kept.append(one)
    return kept
