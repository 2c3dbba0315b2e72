"""What a plan takes beside the other ways to train, and what to advise.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pdjax.planner.cost_model import Costs, MemoryForm, Part, PlacedStage
from pdjax.planner.plan import Plan, Strategy
from pdjax.planner.search import fastest
from pdjax.planner.table import format_seconds
from pdjax.profile import Profile
from pdjax.topology import Topology

_GPIPE_MICROBATCHES = 4  # for each stage: the paper finds the bubble negligible from there on
_NOTEWORTHY = 1.02  # times as fast: less is not worth a sentence


@dataclass(frozen=True)
class Case:
    """A question to the planner.

    Attributes:
        profile: the layers.
        costs: what they cost on the machines.
        schedule: name of the algorithm.
        num_microbatches: microbatches in a minibatch.
        flushes: whether the pipeline is emptied after each minibatch.
    """

    profile: Profile
    costs: Costs
    schedule: str
    num_microbatches: int
    flushes: bool

    def on(self, topology: Topology) -> Case:
        """The same question for other machines."""
        return replace(self, costs=self.costs.changed(topology=topology))

    def microbatch_s(self, parts: tuple[Part, ...]) -> float:
        """Seconds for each microbatch, with the filling and draining of a flushed pipeline."""
        slowest = self.costs.plan_s(parts)
        if not self.flushes:
            return slowest
        count = self.num_microbatches
        return ((count - 1) * slowest + self.through_s(parts)) / count

    def through_s(self, parts: tuple[Part, ...]) -> float:
        """Seconds that one microbatch takes through all stages and back."""
        work = sum(
            float(self.costs.work_s(stage.first, stage.stop, stage.remat))
            for stage in self.costs.stages(parts)
        )
        return max(work + sum(self._cuts_s(parts)), self.costs.plan_s(parts))

    def _cuts_s(self, parts: tuple[Part, ...], level: int | None = None) -> Iterator[float]:
        level = len(self.costs.topology.levels) - 1 if level is None else level
        for number, part in enumerate(parts):
            if number:
                yield self.costs.cut_s(part.first, level)
            if part.inner:
                yield from self._cuts_s(part.inner, level - 1)

    def stage_s(self, parts: tuple[Part, ...], stage: PlacedStage) -> float:
        """Seconds for each microbatch of one stage, as the slowest of what it takes part in."""
        level, outer, slowest = len(self.costs.topology.levels) - 1, 1, 0.0
        while parts:
            part = next(p for p in parts if p.first <= stage.first < p.stop)
            if not part.inner:
                return max(slowest, self.costs.part_s(part, level, outer) / outer)
            bare = replace(part, inner=())
            slowest = max(slowest, self._sync_only_s(bare, level, outer) / outer)
            parts, level, outer = part.inner, level - 1, outer * part.replicas
        return slowest

    def _sync_only_s(self, part: Part, level: int, outer: int) -> float:
        bandwidth = self.costs.topology.levels[level].bandwidth_bytes_per_s
        each = self.costs.cost.sync_s_per_byte(part.replicas, bandwidth, outer)
        return each * self.costs.params_of(part) / part.replicas


def strategy(case: Case, name: str, parts: tuple[Part, ...]) -> Strategy:
    """What training by a plan takes."""
    costs = case.costs
    stages = costs.stages(parts)
    return Strategy(
        name=name,
        workers=sum(stage.replicas for stage in stages),
        microbatch_s=case.microbatch_s(parts),
        wire_bytes=sum(map(costs.wire_bytes, stages)),
        peak_bytes=max(map(costs.stage_bytes, stages)),
        fits=costs.excess_bytes(parts) == 0,
    )


def alternatives(case: Case) -> tuple[Strategy, ...]:
    """Data parallelism, model parallelism without pipelining, GPipe and a single worker."""
    found = [_data_parallelism(case)]
    if case.costs.topology.num_workers > 1 and case.costs.num_layers > 1:
        found += [_model_parallelism(case), *_gpipe(case)]
    return (*found, _single_worker(case))


def _whole(case: Case, level: int, replicated: bool) -> tuple[Part, ...]:
    """All layers as one part, on every unit or on one."""
    inner = _whole(case, level - 1, replicated) if level else ()
    units = case.costs.topology.levels[level].num_units if replicated else 1
    return (Part(0, case.costs.num_layers, units, 0, inner),)


def _top(case: Case) -> int:
    return len(case.costs.topology.levels) - 1


def _synchronous(case: Case, num_microbatches: int, *, keeps_all: bool = False) -> Case:
    """The same question for a schedule that keeps one version of the weights."""
    old = case.costs.memory
    memory = MemoryForm(
        stashes=False,
        num_microbatches=num_microbatches,
        keeps_all=keeps_all,
        optimizer_bytes_per_param_byte=old.optimizer_bytes_per_param_byte,
        buffers=old.buffers,
        remat=old.remat,
    )
    return replace(case, costs=case.costs.changed(memory=memory))


def _data_parallelism(case: Case) -> Strategy:
    alone = replace(_synchronous(case, 1), flushes=False)
    parts = _whole(alone, _top(alone), replicated=True)
    return strategy(alone, "data parallelism", parts)


def _single_worker(case: Case) -> Strategy:
    alone = replace(_synchronous(case, 1), flushes=False)
    return strategy(alone, "one worker", _whole(alone, _top(alone), replicated=False))


def _model_parallelism(case: Case) -> Strategy:
    one = replace(_synchronous(case, 1), flushes=True, num_microbatches=1)
    parts = _straight_parts(one)
    return strategy(one, f"model parallelism, {len(one.costs.stages(parts))} stages", parts)


def _gpipe(case: Case) -> list[Strategy]:
    if case.schedule == "gpipe":
        return []
    count = case.num_microbatches
    if count == 1:
        count = _GPIPE_MICROBATCHES * min(case.costs.topology.num_workers, case.costs.num_layers)
    several = replace(
        _synchronous(case, count, keeps_all=True), flushes=True, num_microbatches=count
    )
    parts = _straight_parts(several)
    return [strategy(several, f"GPipe, {count} microbatches", parts)]


def _straight_parts(case: Case) -> tuple[Part, ...]:
    parts = fastest(case.costs, straight=True)
    if parts is None:  # none fits: shown all the same, marked so
        endless = replace(case.costs.topology, memory_bytes=())
        parts = fastest(case.costs.changed(topology=endless), straight=True)
    assert parts is not None, "without limits one worker can hold everything"
    return parts


# ---------------------------------------------------------------- advice


def advice(case: Case, plan: Plan, chosen: Strategy, others: tuple[Strategy, ...]) -> str:
    """What to do, in a sentence; and another where memory forces stages to recompute."""
    data_parallelism, alone = others[0], others[-1]
    sentence = _use(plan, chosen, alone)
    if plan.num_stages > 1:
        sentence += _beside(chosen, data_parallelism)
    return f"{sentence}.{_recomputing(case, plan)}"


def _use(plan: Plan, chosen: Strategy, alone: Strategy) -> str:
    gain = _times_as_fast(chosen, alone)
    if chosen.workers == 1:
        return "Use one worker: more of them would be no faster here"
    if plan.num_stages == 1:
        what = f"Use data parallelism on {chosen.workers} workers: no pipeline is faster here"
    elif chosen.workers == plan.num_stages:
        what = f"Use a straight pipeline of {plan.num_stages} stages"
    else:
        what = f"Use a pipeline of {plan.num_stages} stages with {plan.notation} replicas"
    return f"{what} ({gain:.1f} times one worker)"


def _times_as_fast(one: Strategy, other: Strategy) -> float:
    """How many times as fast `one` is; 1 where a model takes no time at all."""
    return other.microbatch_s / one.microbatch_s if one.microbatch_s else 1.0


def _beside(chosen: Strategy, other: Strategy) -> str:
    if not other.fits:
        return "; data parallelism does not fit into memory"
    gain = _times_as_fast(chosen, other)
    if gain < 1 / _NOTEWORTHY:
        return f"; data parallelism would be {1 / gain:.1f} times as fast"
    if gain < _NOTEWORTHY:
        return "; data parallelism would be as fast"
    text = f": {gain:.1f} times as fast as data parallelism"
    if chosen.wire_bytes and other.wire_bytes > _NOTEWORTHY * chosen.wire_bytes:
        text += f", with {1 - chosen.wire_bytes / other.wire_bytes:.0%} fewer bytes sent"
    return text


def _recomputing(case: Case, plan: Plan) -> str:
    stages = [number for number, how in enumerate(plan.remat) if how == "full"]
    if not stages:
        return ""
    costs = case.costs
    bounds = [*plan.first_layers, costs.num_layers]
    more = [float(costs.forward_s[bounds[s + 1]] - costs.forward_s[bounds[s]]) for s in stages]
    names = ", ".join(map(str, stages))
    which = (
        f"stage {names} recomputes its" if len(stages) == 1 else f"stages {names} recompute their"
    )
    return (
        f" To fit into memory, {which} forward pass in the backward pass, which adds up to "
        f"{format_seconds(max(more))} for each microbatch and worker."
    )
