"""What a plan takes beside the other ways to train, and what to advise.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pdjax.plan.cost_model import Costs, Part, PlacedStage
from pdjax.plan.figures import Strategy
from pdjax.plan.plan import Plan
from pdjax.plan.search import fastest
from pdjax.topology.topology import Topology
from pdjax.units import format_seconds

_GPIPE_MICROBATCHES = 4  # for each stage: the paper finds the bubble negligible from there on
_NOTEWORTHY = 1.05  # times as fast: less is not worth a sentence


@dataclass(frozen=True)
class Case:
    """A question to the planner.

    Attributes:
        costs: what the layers cost on the machines.
        schedule: name of the algorithm.
        num_microbatches: microbatches in a minibatch.
        flushes: whether the pipeline is emptied after each minibatch.
        overlaps: whether several microbatches are under way at once.
    """

    costs: Costs
    schedule: str
    num_microbatches: int
    flushes: bool
    overlaps: bool = True

    def on(self, topology: Topology) -> Case:
        """The same question for other machines."""
        return replace(self, costs=self.costs.changed(topology=topology))

    def with_options(self, *, slack: int, update_lag: int) -> Case:
        """The same question for a schedule with other options."""
        memory = replace(self.costs.memory, slack=slack, update_lag=update_lag)
        return replace(self, costs=self.costs.changed(memory=memory))

    def microbatch_s(self, parts: tuple[Part, ...]) -> float:
        """Seconds for each microbatch, with the filling and draining of a flushed pipeline.

        One microbatch goes through all stages; meanwhile the busiest replica, or link, has the
        others of its share still to do. All-reduces set a limit of their own.
        """
        slowest = self.costs.plan_s(parts)
        if not self.flushes:
            return slowest
        count = self.num_microbatches
        if not self.overlaps:
            return max(self.through_s(parts), slowest)
        rest = [
            (-(-count // stage.replicas) - 1)
            * float(self.costs.work_s(stage.first, stage.stop, stage.remat))
            for stage in self.costs.stages(parts)
        ]
        rest += [(count - 1) * cut for cut in self._cuts_s(parts)]
        return max((self.through_s(parts) + max(rest)) / count, slowest)

    def through_s(self, parts: tuple[Part, ...]) -> float:
        """Seconds that one microbatch takes through all stages and back."""
        work = sum(
            float(self.costs.work_s(stage.first, stage.stop, stage.remat))
            for stage in self.costs.stages(parts)
        )
        return work + sum(self._cuts_s(parts))

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
            sync = self.costs.sync_s(part.first, part.stop, part.replicas, level, outer)
            slowest = max(slowest, float(sync) / (part.replicas * outer))
            parts, level, outer = part.inner, level - 1, outer * part.replicas
        return slowest


def strategy(case: Case, name: str, parts: tuple[Part, ...], *, anywhere: bool = False) -> Strategy:
    """What training by a plan takes; `anywhere` if its one worker may be any of them."""
    costs = case.costs
    stages = costs.stages(parts)
    fits = costs.excess_bytes(parts) == 0
    if anywhere and costs.topology.memory_bytes:
        fits = costs.stage_bytes(stages[0]) <= max(costs.topology.memory_bytes)
    return Strategy(
        name=name,
        workers=sum(stage.replicas for stage in stages),
        microbatch_s=case.microbatch_s(parts),
        wire_bytes=sum(map(costs.wire_bytes, stages)),
        peak_bytes=max(map(costs.stage_bytes, stages)),
        fits=fits,
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
    memory = replace(
        case.costs.memory,
        stashes=False,
        versions=None,
        num_microbatches=num_microbatches,
        keeps_all=keeps_all,
    )
    return replace(case, costs=case.costs.changed(memory=memory))


def _data_parallelism(case: Case) -> Strategy:
    if case.flushes:  # the same minibatch, its microbatches shared out
        shared = replace(_synchronous(case, case.num_microbatches), overlaps=True)
        parts = _whole(shared, _top(shared), replicated=True)
        return strategy(shared, "data parallelism", parts)
    alone = replace(_synchronous(case, 1), flushes=False)
    return strategy(alone, "data parallelism", _whole(alone, _top(alone), replicated=True))


def _single_worker(case: Case) -> Strategy:
    alone = replace(_synchronous(case, 1), flushes=False)
    parts = _whole(alone, _top(alone), replicated=False)
    return strategy(alone, "one worker", parts, anywhere=True)


def _model_parallelism(case: Case) -> Strategy:
    one = replace(_synchronous(case, 1), flushes=True, num_microbatches=1, overlaps=True)
    parts = _straight_parts(one)
    return strategy(one, f"model parallelism, {len(one.costs.stages(parts))} stages", parts)


def _gpipe(case: Case) -> list[Strategy]:
    if case.schedule == "gpipe":
        return []
    count = case.num_microbatches
    if count == 1:
        count = _GPIPE_MICROBATCHES * min(case.costs.topology.num_workers, case.costs.num_layers)
    several = replace(
        _synchronous(case, count, keeps_all=True),
        flushes=True,
        num_microbatches=count,
        overlaps=True,
    )
    parts = _straight_parts(several)
    return [strategy(several, f"GPipe, {count} microbatches", parts)]


def _straight_parts(case: Case) -> tuple[Part, ...]:
    parts = fastest(case.costs, replicate=False)
    if parts is None:  # none fits: shown all the same, marked so
        endless = replace(case.costs.topology, memory_bytes=())
        parts = fastest(case.costs.changed(topology=endless), replicate=False)
    assert parts is not None, "without limits one worker can hold everything"
    return parts


# ---------------------------------------------------------------- advice


def advice(case: Case, plan: Plan, chosen: Strategy, others: tuple[Strategy, ...]) -> str:
    """What to do, in a sentence; what limits the plan; and what memory forces stages to do."""
    sentence = _use(plan, chosen, others[-1]) + _beside(chosen, others[:-1])
    return f"{sentence}.{_limiting(case, plan, chosen)}{_recomputing(case, plan)}"


def _use(plan: Plan, chosen: Strategy, alone: Strategy) -> str:
    if chosen.workers == 1:
        return "Use one worker"
    if plan.num_stages == 1:
        what = f"Use data parallelism on {chosen.workers} workers"
    elif chosen.workers == plan.num_stages:
        what = f"Use a straight pipeline of {plan.num_stages} stages"
    else:
        what = f"Use a pipeline of {plan.num_stages} stages with {plan.notation} replicas"
    gain = _times_as_fast(chosen, alone)
    if not alone.fits:
        return f"{what} (the model does not fit on one worker)"
    return f"{what} ({gain:.1f} times one worker)" if gain >= _NOTEWORTHY else what


def _beside(chosen: Strategy, others: Sequence[Strategy]) -> str:
    """How the plan compares with data parallelism, and with whatever is faster."""
    text = ""
    faster = [o for o in others if o.fits and _times_as_fast(o, chosen) >= _NOTEWORTHY]
    if faster:
        best = min(faster, key=lambda other: other.microbatch_s)
        text = f"; {best.name} would be {_times_as_fast(best, chosen):.1f} times as fast"
    if chosen.workers == 1:
        return text or ": more of them would be no faster here"
    other = others[0]
    if (
        other.workers == chosen.workers and other.wire_bytes == chosen.wire_bytes
    ) or other in faster:
        return text
    if not other.fits:
        return f"; data parallelism does not fit into memory{text}"
    gain = _times_as_fast(chosen, other)
    if gain < _NOTEWORTHY:
        return f"; data parallelism would be about as fast{text}"
    compared = f": {gain:.1f} times as fast as data parallelism"
    if chosen.wire_bytes and other.wire_bytes > _NOTEWORTHY * chosen.wire_bytes:
        compared += f", with {1 - chosen.wire_bytes / other.wire_bytes:.0%} fewer bytes sent"
    return compared + text


def _limiting(case: Case, plan: Plan, chosen: Strategy) -> str:
    """Says so if a link, and no worker, decides how fast the plan is."""
    busiest = max(stage.stage_s for stage in plan.stages)
    slowest = chosen.microbatch_s
    if case.flushes or slowest <= busiest * _NOTEWORTHY:
        return ""
    return (
        f" A link limits it: what crosses a cut takes {format_seconds(slowest)}, the busiest stage "
        f"{format_seconds(busiest)}."
    )


def _times_as_fast(one: Strategy, other: Strategy) -> float:
    """How many times as fast `one` is; 1 where a model takes no time at all."""
    return other.microbatch_s / one.microbatch_s if one.microbatch_s else 1.0


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
