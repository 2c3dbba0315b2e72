"""From a profile and the machines to the plan with the highest steady-state throughput.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pdjax.plan.alternatives import Case, advice, alternatives, strategy
from pdjax.plan.cost_model import CostForm, Costs, MemoryForm, Part, PlacedStage, Sync
from pdjax.plan.figures import Prediction, StageFigures
from pdjax.plan.infeasible import explain_infeasibility
from pdjax.plan.plan import Plan
from pdjax.plan.search import fastest
from pdjax.profile.profile import Profile
from pdjax.schedules import Algorithm, find_algorithm
from pdjax.schedules.versions import peak_in_flight
from pdjax.schedules.weight_rule import DOUBLE_BUFFER
from pdjax.topology.topology import Topology

_MANY = 8  # units, on one level, above which not every smaller number is tried


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is to be like.

    Attributes:
        schedule: name of the algorithm that will run it.
        num_microbatches: microbatches in a minibatch.
        num_stages: exactly how many stages; as many as are best if None.
        replicate: whether stages may be replicated.
        remat: what the stages recompute: ``"none"``, ``"full"`` (their forward pass, all of them),
            or ``"auto"`` (that, where memory would not suffice).
        optimizer_bytes_per_param_byte: size of the optimizer state: 2 for Adam, 0 for plain SGD.
        together: ranges of layers (first, last) that stay in one stage.
        overlap: whether passes and the all-reduce among replicas overlap, so that the longer one
            counts, as where updates are a round late (`pipedream` with ``update_lag=1``); otherwise
            an update waits for the all-reduce, and the next pass for the update.
        sync: what an all-reduce is taken to send; see `CostForm`.
        slack: forward passes of each stage beyond the smallest warm-up; see
            `pdjax.schedules.warm_ups`. None to choose it by simulation.
        update_lag: rounds by which updates of replicated stages are late, where the schedule has
            that; None to choose it by simulation.
    """

    schedule: str = "pipedream"
    num_microbatches: int = 1
    num_stages: int | None = None
    replicate: bool = True
    remat: Literal["auto", "none", "full"] = "auto"
    optimizer_bytes_per_param_byte: float = 2.0
    together: tuple[tuple[int, int], ...] = ()
    overlap: bool = False
    sync: Sync = "ring"
    slack: int | None = None
    update_lag: int | None = None

    def __post_init__(self) -> None:
        find_algorithm(self.schedule)
        for name in ("num_microbatches", "num_stages"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name}={count}; expected at least 1.")
        if not 0 <= self.optimizer_bytes_per_param_byte < float("inf"):
            raise ValueError(
                f"optimizer_bytes_per_param_byte={self.optimizer_bytes_per_param_byte}; expected "
                "a number that is not negative, such as 2 for Adam."
            )
        for name in ("slack", "update_lag"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}; expected a number from 0 on.")
        if self.remat not in ("auto", "none", "full"):
            raise ValueError(f"remat={self.remat!r}; expected 'auto', 'none' or 'full'.")
        if self.sync not in ("ring", "paper", "original"):
            raise ValueError(f"sync={self.sync!r}; expected 'ring', 'paper' or 'original'.")


def search_plan(profile: Profile, topology: Topology, options: PlanOptions | None = None) -> Plan:
    """The plan with the highest steady-state throughput that fits; nothing is simulated.

    Args and errors as for `search`.
    """
    return as_plan(*search(profile, topology, options or PlanOptions()))


def search(
    profile: Profile, topology: Topology, options: PlanOptions
) -> tuple[Case, tuple[Part, ...]]:
    """The costs, and the parts of the plan with the highest steady-state throughput that fits.

    Of all nested plans, with any replication and any number of workers up to all, the one whose
    slowest part takes the least time; see `pdjax.plan.cost_model` for what is charged. Under a
    schedule that is flushed after each minibatch, filling and draining count, too: that plan is
    then compared with the best ones on fewer workers, with data parallelism and with one worker,
    so that the answer is good, but not proved to be the best.

    Args:
        profile: the layers.
        topology: the machines.
        options: what the plan is to be like.

    Raises:
        ValueError: if there are fewer layers or workers than stages asked for, or if nothing
            fits; the text then says how many bytes are missing and what would make it fit.
    """
    case = make_case(profile, topology, options)
    _check(case, options)
    found = _best(case, options)
    if found is None:
        raise ValueError(explain_infeasibility(case, options.replicate, options.num_stages))
    return case, found


def make_case(profile: Profile, topology: Topology, options: PlanOptions) -> Case:
    """The costs of all that may be planned."""
    algorithm = find_algorithm(options.schedule)
    count = options.num_microbatches
    sample = algorithm.make(2 * algorithm.num_chunks, max(count, 2) if algorithm.divides else count)
    flushes = sample.flushes
    cost = CostForm(
        overlap=options.overlap,
        sync=options.sync,
        num_microbatches=options.num_microbatches if flushes else None,
    )
    memory = memory_form(
        algorithm,
        options.num_microbatches,
        options.optimizer_bytes_per_param_byte,
        options.remat,
    )
    together = (*options.together, *profile.inseparable, *(() if flushes else profile.tied))
    costs = Costs(profile, topology, cost, memory, together)
    overlaps = not flushes or memory.num_microbatches != 1 or options.num_microbatches == 1
    return Case(costs, options.schedule, options.num_microbatches, flushes, overlaps)


def memory_form(
    algorithm: Algorithm,
    num_microbatches: int,
    optimizer_bytes: float,
    remat: Literal["auto", "none", "full"],
) -> MemoryForm:
    """What an algorithm keeps, found by counting what two stages of it have in flight.

    Where workers run several stages it is taken to be what 1F1B keeps.
    """
    if algorithm.num_chunks > 1:
        algorithm = find_algorithm("one_f_one_b")
    sample = algorithm.make(2, 4 if algorithm.divides else 1)
    workers = sample.unroll(8)
    first, last = (peak_in_flight(workers[stage], stage) for stage in (0, 1))
    flushed = None
    if sample.flushes:
        flushed = 1 if first == 1 else num_microbatches
    return MemoryForm(
        stashes=algorithm.weight_rule.backward == "stashed",
        versions=2 if algorithm.weight_rule == DOUBLE_BUFFER else None,
        num_microbatches=flushed,
        keeps_all=sample.flushes and last > 1,
        optimizer_bytes_per_param_byte=optimizer_bytes,
        remat=remat,
    )


def _check(case: Case, options: PlanOptions) -> None:
    profile, topology, requested = case.costs.profile, case.costs.topology, options.num_stages
    for first, last in options.together:
        if not 0 <= first <= last < len(profile.layers):
            raise ValueError(
                f"together has ({first}, {last}); expected the first and the last layer of a "
                f"range, from 0 to {len(profile.layers) - 1}."
            )
    if requested is None:
        return
    if requested > len(profile.layers):
        raise ValueError(
            f"{requested} stages need at least as many layers, but the profile has "
            f"{len(profile.layers)}: {', '.join(profile.names[:12])}. Use fewer stages, or write "
            "the model in smaller modules."
        )
    if requested > topology.num_workers:
        raise ValueError(
            f"{requested} stages need at least as many workers, but the topology {topology} has "
            f"{topology.num_workers}. Use fewer stages or more workers."
        )
    closed = int(np.isinf(case.costs.width_bytes).sum())
    if requested > len(profile.layers) - closed:
        raise ValueError(
            f"{requested} stages cannot be made of {len(profile.layers)} layers of which some must "
            f"stay together (they share a parameter or a state, or were asked to): at most "
            f"{len(profile.layers) - closed} stages. Use fewer stages, or a synchronous schedule "
            "such as 'one_f_one_b', under which tied weights may be separated."
        )


def _best(case: Case, options: PlanOptions) -> tuple[Part, ...] | None:
    replicate, num_stages = options.replicate, options.num_stages
    best = fastest(case.costs, replicate=replicate, num_stages=num_stages)
    if best is None or not case.flushes:
        return best
    found = [best]
    for smaller in _fewer_workers(case.costs.topology):
        if smaller.num_workers >= (num_stages or 1):
            costs = case.on(smaller).costs
            found.append(fastest(costs, replicate=False, num_stages=num_stages) or best)
            if replicate:
                found.append(fastest(costs, num_stages=num_stages) or best)
                found.append(_single_stage(costs, num_stages) or best)
    return min(found, key=case.microbatch_s)


def _single_stage(costs: Costs, num_stages: int | None) -> tuple[Part, ...] | None:
    return fastest(costs, num_stages=1) if num_stages in (None, 1) else None


def _fewer_workers(topology: Topology) -> Iterator[Topology]:
    """The topology, and parts of it: some units of the outermost level, some inside one unit."""
    yield topology
    if len(set(topology.memory_bytes)) > 1:
        return
    for level in reversed(range(len(topology.levels))):
        most = _MANY // len(topology.levels)
        for count in _fewer(topology.levels[level].num_units, most):
            levels = tuple(
                replace(
                    each, num_units=1 if at > level else count if at == level else each.num_units
                )
                for at, each in enumerate(topology.levels)
            )
            smaller = replace(topology, levels=levels, memory_bytes=())
            yield replace(smaller, memory_bytes=topology.memory_bytes[: smaller.num_workers])


def _fewer(num_units: int, many: int) -> list[int]:
    """Smaller numbers of units: all of them, or, if they are many, halves of halves."""
    if num_units <= many:
        return list(range(1, num_units))
    return [num_units >> by for by in range(1, num_units.bit_length())]


def as_plan(
    case: Case, parts: tuple[Part, ...], simulated_microbatch_s: float | None = None
) -> Plan:
    """The plan that consists of some parts, with its predictions and the advice.

    Args:
        case: the costs; their `MemoryForm` has slack and update lag.
        parts: the plan.
        simulated_microbatch_s: seconds for each microbatch by simulation, if it was simulated.
    """
    plan = plan_of_parts(case, parts)
    others = alternatives(case.with_options(slack=0, update_lag=0))
    chosen = limit = strategy(case, f"this plan, {plan.notation}", parts)
    if simulated_microbatch_s is not None:
        chosen = replace(limit, microbatch_s=simulated_microbatch_s)
    prediction = Prediction(
        schedule=case.schedule,
        topology=str(case.costs.topology),
        source=case.costs.profile.source,
        num_microbatches=case.num_microbatches,
        batch_size=case.costs.profile.batch_size,
        chosen=chosen,
        others=others,
        advice=advice(case, plan, chosen, others),
        limit_s=None if chosen is limit else limit.microbatch_s * case.num_microbatches,
    )
    return replace(plan, prediction=prediction)


def plan_of_parts(case: Case, parts: tuple[Part, ...]) -> Plan:
    """The same without predictions for the whole."""
    stages = case.costs.stages(parts)
    total = sum(case.costs.work_s(stage.first, stage.stop, stage.remat) for stage in stages)
    figures = tuple(_figures(case, parts, stage) for stage in stages)
    return Plan(
        layers=case.costs.profile.names,
        first_layers=tuple(stage.first for stage in stages),
        shares=tuple(stage.compute_s / total if total else 0.0 for stage in figures),
        model=case.costs.profile.model,
        stages=figures,
        slack=case.costs.memory.slack,
        update_lag=case.costs.memory.update_lag,
    )


def _figures(case: Case, parts: tuple[Part, ...], stage: PlacedStage) -> StageFigures:
    costs = case.costs
    limit = costs.limit_bytes(stage.workers)
    stash = float(costs.stash_bytes[stage.stop] - costs.stash_bytes[stage.first])
    if stage.remat:
        stash = float(costs.width_bytes[stage.first])
    return StageFigures(
        workers=stage.workers,
        warm_up=stage.warm_up,
        remat="full" if stage.remat else "none",
        forward_s=float(costs.forward_s[stage.stop] - costs.forward_s[stage.first]),
        compute_s=float(costs.work_s(stage.first, stage.stop, stage.remat)),
        stage_s=case.stage_s(parts, stage),
        param_bytes=costs.params_of(stage),
        stash_bytes=stash,
        cut_bytes=float(costs.width_bytes[stage.stop]),
        in_flight=int(costs.memory.in_flight(stage.warm_up)),
        peak_bytes=costs.stage_bytes(stage),
        limit_bytes=None if limit == float("inf") else limit,
        wire_bytes=costs.wire_bytes(stage) / stage.replicas,
    )
