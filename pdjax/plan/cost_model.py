"""What a plan costs: seconds and bytes of runs of layers on some workers.

The time of a pipeline is that of its slowest stage or cut (SOSP 2019, section 3.1). A stage of the
layers i … j on m units of a level takes

    max(compute, all-reduce) / m        where both overlap, else their sum

and what crosses a cut takes twice its bytes (forward and back) over the bandwidth of the level. A
part of an outer level is a pipeline of its own on the units inside, replicated m times.

A worker keeps versions of its weights, their gradient, the optimizer state, the stash of every
microbatch in flight, and a buffer each way for what crosses its cuts.

Nothing here imports JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pdjax.profile.profile import Profile
from pdjax.topology.topology import Topology

BUFFERS = 2
"""How many buffers a worker has for what crosses each of its cuts: one each way."""

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
        num_microbatches: of a minibatch, at the end of which replicas synchronise; None if they do
            after every round, one microbatch for each.
    """

    overlap: bool = True
    sync: Sync = "ring"
    activations: bool = True
    num_microbatches: int | None = None

    def sync_s_per_byte(
        self, num_replicas: Any, bandwidth_bytes_per_s: float, outer_replicas: int = 1
    ) -> Any:
        """Seconds to synchronise each byte of parameters over `num_replicas`, for each round.

        Args:
            num_replicas: units that synchronise; may be an array.
            bandwidth_bytes_per_s: of their links.
            outer_replicas: how often all these units are replicated on outer levels.
        """
        m = num_replicas
        factor = {"ring": 2, "paper": 2, "original": 4}[self.sync] * (m - 1)
        if self.sync != "paper":
            factor = factor / m
        each = factor / bandwidth_bytes_per_s
        if self.num_microbatches is None:
            return each
        return each / np.maximum(1.0, self.num_microbatches / (m * outer_replicas))

    def stage_s(self, inner_s: Any, sync_s: Any, num_replicas: Any) -> Any:
        """Seconds for each microbatch of what takes `inner_s` on one of its replicas; or arrays."""
        together = np.maximum(inner_s, sync_s) if self.overlap else inner_s + sync_s
        return together / num_replicas


@dataclass(frozen=True)
class MemoryForm:
    """What a schedule and its weight rule keep.

    Attributes:
        stashes: whether a version of the weights is kept for each microbatch in flight (weight
            stashing), or one for all.
        versions: how many versions are kept on every stage, if it is the same number on all.
        num_microbatches: of a minibatch, after which the pipeline is flushed, so that no more are
            ever in flight; None if it never is.
        keeps_all: whether all microbatches of a minibatch are in flight together (GPipe).
        optimizer_bytes_per_param_byte: size of the optimizer state: 2 for Adam, 0 for plain SGD.
        remat: whether stages keep only their input of each microbatch in flight, and repeat their
            forward pass before the backward pass: ``"none"``, ``"full"`` (all of them), or
            ``"auto"`` (those for which memory would not suffice).
        slack: forward passes of each stage but the last beyond the smallest warm-up.
        update_lag: rounds by which updates are late, each of which keeps a version more.
    """

    stashes: bool = True
    versions: int | None = None
    num_microbatches: int | None = None
    keeps_all: bool = False
    optimizer_bytes_per_param_byte: float = 2.0
    remat: Literal["auto", "none", "full"] = "auto"
    slack: int = 0
    update_lag: int = 0

    def __post_init__(self) -> None:
        if self.keeps_all and self.num_microbatches is None:
            raise ValueError(
                "keeps_all without num_microbatches; expected how many microbatches are kept."
            )

    def param_copies(self, warm_up: Any) -> Any:
        """How often the bytes of a stage's parameters are kept: versions, gradient, optimizer.

        Args:
            warm_up: forward passes of the stage before its first backward pass, or an array.
        """
        versions = warm_up + 1 if self.stashes else warm_up * 0 + 1
        if self.versions is not None:
            versions = warm_up * 0 + self.versions
        return versions + self.update_lag + 1 + self.optimizer_bytes_per_param_byte

    def in_flight(self, warm_up: Any) -> Any:
        """The most microbatches in flight on a stage."""
        if self.keeps_all:
            return warm_up * 0 + self.num_microbatches
        if self.num_microbatches is None:
            return warm_up + 1
        return np.minimum(warm_up + 1, self.num_microbatches)


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
        remat: whether it repeats its forward pass before the backward pass; only of a part whose
            unit is a worker.
    """

    first: int
    stop: int
    replicas: int
    unit: int
    inner: tuple[Part, ...] = ()
    remat: bool = False


@dataclass(frozen=True)
class PlacedStage:
    """A stage of a nested plan.

    Attributes:
        first: its first layer.
        stop: the layer after its last.
        replicas: number of its workers.
        warm_up: forward passes of each worker before its first backward pass.
        workers: the workers, in topology order.
        remat: whether it repeats its forward pass before the backward pass.
    """

    first: int
    stop: int
    replicas: int
    warm_up: int
    workers: tuple[int, ...]
    remat: bool


class Costs:
    """The times and bytes of runs of layers, and of plans made of them.

    Args:
        profile: the layers.
        topology: the workers.
        cost: how times are put together.
        memory: what a worker keeps.
        together: ranges of layers (first, last) that no cut may separate.

    Attributes:
        compute_s: sums over the layers before each layer: seconds of both passes.
        forward_s: the same of the forward pass.
        param_bytes: the same of the parameters.
        stash_bytes: the same of the stash.
        width_bytes: for each layer what crosses a cut before it; infinite if none is allowed.
    """

    def __init__(
        self,
        profile: Profile,
        topology: Topology,
        cost: CostForm,
        memory: MemoryForm,
        together: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.profile, self.topology, self.cost, self.memory = profile, topology, cost, memory
        self.together = tuple(together)
        self.compute_s = _sums(profile.column("compute_s"))
        self.forward_s = _sums(profile.column("forward_s"))
        self.param_bytes = _sums(profile.column("param_bytes"))
        self.stash_bytes = _sums(profile.column("stash_bytes"))
        self.num_layers = len(profile.layers)
        self.width_bytes = np.concatenate([[0.0], np.asarray(profile.column("cut_bytes"), float)])
        self.width_bytes[-1] = 0.0
        for first, last in together:
            self.width_bytes[first + 1 : last + 1] = math.inf

    def changed(
        self,
        *,
        profile: Profile | None = None,
        topology: Topology | None = None,
        memory: MemoryForm | None = None,
    ) -> Costs:
        """The costs under other conditions."""
        return Costs(
            profile or self.profile,
            topology or self.topology,
            self.cost,
            memory or self.memory,
            self.together,
        )

    # -------- seconds

    def cut_s(self, at: int, level: int) -> float:
        """Seconds for each microbatch to send what crosses the cut before layer `at`, both ways."""
        if not self.cost.activations:
            return 0.0
        bandwidth = self.topology.levels[level].bandwidth_bytes_per_s
        return 2 * float(self.width_bytes[at]) / bandwidth

    def plan_s(self, parts: tuple[Part, ...], level: int | None = None, outer: int = 1) -> float:
        """Seconds for each microbatch of a pipeline of `parts`: of its slowest part or cut.

        Args:
            parts: the pipeline.
            level: the level of its units; the outermost if None.
            outer: how often it is replicated on outer levels.
        """
        level = len(self.topology.levels) - 1 if level is None else level
        cuts = [self.cut_s(part.first, level) for part in parts[1:]]
        return max([*cuts, *(self.part_s(part, level, outer) for part in parts)])

    def part_s(self, part: Part, level: int, outer: int = 1) -> float:
        """Seconds for each microbatch of one part of a pipeline; arguments as in `plan_s`."""
        if part.inner:
            inner = self.plan_s(part.inner, level - 1, outer * part.replicas)
        else:
            inner = self.work_s(part.first, part.stop, part.remat)
        sync = self.sync_s(part.first, part.stop, part.replicas, level, outer)
        return float(self.cost.stage_s(inner, sync, part.replicas))

    def stage_s(self, first: Any, stop: Any, replicas: Any, outer: int, remat: bool) -> Any:
        """Seconds for each microbatch of stages on the innermost level; or arrays."""
        work = self.work_s(first, stop, remat)
        return self.cost.stage_s(work, self.sync_s(first, stop, replicas, 0, outer), replicas)

    def sync_s(self, first: Any, stop: Any, replicas: Any, level: int, outer: int) -> Any:
        """Seconds for each round to synchronise runs of layers over units of a level."""
        each = self.sync_s_per_byte(replicas, level, outer)
        return each * (self.param_bytes[stop] - self.param_bytes[first])

    def sync_s_per_byte(self, num_replicas: Any, level: int, outer: int) -> Any:
        """Seconds to synchronise each byte of parameters over units of a level."""
        bandwidth = self.topology.levels[level].bandwidth_bytes_per_s
        return self.cost.sync_s_per_byte(num_replicas, bandwidth, outer)

    def work_s(self, first: Any, stop: Any, remat: bool) -> Any:
        """Seconds that a microbatch takes on one worker that holds the layers."""
        seconds = self.compute_s[stop] - self.compute_s[first]
        if remat:
            seconds = seconds + self.forward_s[stop] - self.forward_s[first]
        return seconds

    def params_of(self, part: Part | PlacedStage) -> float:
        """Bytes of its parameters."""
        return float(self.param_bytes[part.stop] - self.param_bytes[part.first])

    # -------- bytes

    def wire_bytes(self, stage: PlacedStage) -> float:
        """Bytes that all workers of a stage send for each microbatch.

        Activations to the next stage, gradients to the one before, and the all-reduce of a round,
        ``2 (r - 1)`` times the weights, divided among its microbatches.
        """
        r = stage.replicas
        width = self.width_bytes[stage.first] + self.width_bytes[stage.stop]
        round_ = max(r, self.cost.num_microbatches or 0)
        return float(width) + 2 * (r - 1) * self.params_of(stage) / round_

    def stages(self, parts: tuple[Part, ...]) -> tuple[PlacedStage, ...]:
        """The stages of a plan, in order, with their workers and warm-up counts.

        The number of warm-up passes is the smallest that keeps every stage busy: 0 on the last
        stage, before it ``ceil(r_next (w_next + 1) / r)``, and the slack.
        """
        placed: list[PlacedStage] = []
        demand = 0
        for part, workers in reversed(list(self._leaves(parts))):
            replicas = len(workers)
            warm_up = -(-demand // replicas) + (self.memory.slack if placed else 0)
            demand = replicas * (warm_up + 1)
            placed.append(
                PlacedStage(part.first, part.stop, replicas, warm_up, workers, part.remat)
            )
        return tuple(reversed(placed))

    def _leaves(
        self, parts: tuple[Part, ...], level: int | None = None, bases: tuple[int, ...] = (0,)
    ) -> Iterator[tuple[Part, tuple[int, ...]]]:
        level = len(self.topology.levels) - 1 if level is None else level
        for part in parts:
            mine = self.units(level, part.unit, part.replicas, bases)
            if part.inner:
                yield from self._leaves(part.inner, level - 1, mine)
            else:
                yield part, mine

    def units(
        self, level: int, unit: int, replicas: int, bases: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The first workers of some units of a level, inside each of the outer units `bases`."""
        size = math.prod(inner.num_units for inner in self.topology.levels[:level])
        chosen = range(unit, unit + replicas)
        return tuple(sorted(base + size * one for one in chosen for base in bases))

    def bytes_of(self, first: Any, stop: Any, warm_up: Any, remat: bool) -> Any:
        """Peak bytes of a worker that holds some layers; all arguments may be arrays."""
        width = self.width_bytes[first]
        kept = self.memory.in_flight(warm_up) * width if remat else 0.0
        return self.bytes_but_input(first, stop, warm_up, remat) + kept + BUFFERS * width

    def bytes_but_input(self, first: Any, stop: Any, warm_up: Any, remat: bool) -> Any:
        """The same without what crosses the cut before the layers.

        It is the less, the later the layers begin.
        """
        stash = self.stash_bytes[stop] - self.stash_bytes[first]
        kept = stash if remat else self.memory.in_flight(warm_up) * stash
        params = self.param_bytes[stop] - self.param_bytes[first]
        return self.memory.param_copies(warm_up) * params + kept + BUFFERS * self.width_bytes[stop]

    def stage_bytes(self, stage: PlacedStage) -> float:
        """Peak bytes of each worker of a stage."""
        return float(self.bytes_of(stage.first, stage.stop, stage.warm_up, stage.remat))

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
