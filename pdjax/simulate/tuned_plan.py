"""Plans whose slack and update lag are chosen by simulation.

The search of `pdjax.plan` knows the steady-state limit of a plan: the time of its busiest stage or
link. How near a run comes to it depends on the warm-up: with the smallest one a stage waits for
transfers and for rounds of replicas. So the plan is simulated with its transfers, with a little
more warm-up (`slack`) and with later updates (`update_lag`) where that brings it nearer.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pdjax.plan.alternatives import Case
from pdjax.plan.cost_model import Part
from pdjax.plan.plan import Plan
from pdjax.plan.planner import PlanOptions, as_plan, plan_of_parts, search
from pdjax.profile.profile import Profile
from pdjax.schedules import find_algorithm
from pdjax.simulate.candidates import Candidates
from pdjax.simulate.steady_state import steady_s
from pdjax.topology.topology import Topology
from pdjax.units import format_bytes

_CLOSE = 1.01  # times that differ by less are no reason to choose
_MOST_SLACK = 2
_MOST_ACTIONS = 400_000  # of a simulation; with more of them a plan keeps its limit


@dataclass(frozen=True)
class _Tuned:
    """A plan with its options.

    Attributes:
        case: the costs, with slack and update lag.
        parts: the plan.
        simulated_s: seconds for each microbatch; None if it takes too long to simulate.
    """

    case: Case
    parts: tuple[Part, ...]
    simulated_s: float | None

    @property
    def microbatch_s(self) -> float:
        return self.case.microbatch_s(self.parts) if self.simulated_s is None else self.simulated_s


def plan_pipeline(profile: Profile, topology: Topology, options: PlanOptions | None = None) -> Plan:
    """The fastest plan that fits, with its schedule's slack and update lag.

    Of all nested plans, with any replication and any number of workers up to all, the one with the
    highest steady-state throughput (see `pdjax.plan.planner.search`). Where updates may be late, a
    plan whose all-reduces are hidden by computing is searched, too. Both are simulated, and the
    faster one is taken. Slack and update lag are the smallest with which a plan takes at most 1 %
    longer than with the best; both cost memory and, under asynchronous schedules, staleness.

    Example:
        >>> from pdjax.profile import LayerProfile, Profile
        >>> layers = tuple(LayerProfile(f"block_{i}", 1e-3, 2e-3, 4e5, 8e6) for i in range(8))
        >>> plan = plan_pipeline(Profile(layers), Topology.parse("4@1GB/s"))
        >>> plan.notation, plan.first_layers, plan.slack
        ('1-1-1-1', (0, 2, 4, 6), 1)

    Args:
        profile: the layers.
        topology: the machines.
        options: requirements on the plan.

    Raises:
        ValueError: if there are fewer layers or workers than stages asked for, if the schedule has
            no slack or update lag and one is given, or if nothing fits; the text then says how many
            bytes are missing and what would make it fit.
    """
    options = options or PlanOptions()
    best = _tuned(*search(profile, topology, options), options)
    if _may_be_late(options) and not options.overlap:
        other = _tuned(*search(profile, topology, replace(options, overlap=True)), options)
        if other.microbatch_s * _CLOSE < best.microbatch_s:
            best = other
    return as_plan(best.case, best.parts, best.simulated_s)


def _may_be_late(options: PlanOptions) -> bool:
    """Whether a plan may have late updates, which hide all-reduces."""
    possible = find_algorithm(options.schedule).takes("update_lag") and options.replicate
    return possible and options.update_lag != 0


def _tuned(case: Case, parts: tuple[Part, ...], options: PlanOptions) -> _Tuned:
    """The plan with its best options."""
    found: list[_Tuned] = []
    excess = 0.0
    limit_s = case.microbatch_s(parts)
    for slack, update_lag in _choices(case, parts, options):
        changed = case.with_options(slack=slack, update_lag=update_lag)
        excess = changed.costs.excess_bytes(parts)
        if excess > 0:  # the search charged the smallest warm-up
            continue
        try:
            found.append(_Tuned(changed, parts, _simulated_s(changed, parts)))
        except ValueError:  # minibatches may be too small for more warm-up (2BW)
            if not found:
                raise
            continue
        if found[-1].microbatch_s <= limit_s * _CLOSE:
            break
    if not found:
        raise ValueError(
            f"the fastest plan does not fit into memory with slack={options.slack} and "
            f"update_lag={options.update_lag}: {format_bytes(excess)} are missing. Give smaller "
            "ones, or leave them to be chosen."
        )
    fastest_s = min(each.microbatch_s for each in found)
    return next(each for each in found if each.microbatch_s <= fastest_s * _CLOSE)


def _choices(
    case: Case, parts: tuple[Part, ...], options: PlanOptions
) -> Iterator[tuple[int, int]]:
    """Pairs of slack and update lag, the least costly ones first."""
    algorithm = find_algorithm(options.schedule)
    stages = case.costs.stages(parts)
    several = algorithm.takes("slack") and len(stages) > 1
    late = _may_be_late(options) and max(stage.replicas for stage in stages) > 1
    slacks = range(_MOST_SLACK + 1 if several else 1) if options.slack is None else [options.slack]
    lags = range(2 if late else 1) if options.update_lag is None else [options.update_lag]
    yield from sorted(((slack, lag) for slack in slacks for lag in lags), key=sum)


def _simulated_s(case: Case, parts: tuple[Part, ...]) -> float | None:
    """Seconds for each microbatch; None for a plan that takes too long to simulate."""
    costs = case.costs
    candidates = Candidates(
        plan_of_parts(case, parts),
        costs.profile,
        costs.topology,
        num_microbatches=case.num_microbatches,
        optimizer_bytes_per_param_byte=costs.memory.optimizer_bytes_per_param_byte,
    )
    memory = costs.memory
    candidate = candidates.of_algorithm(case.schedule, memory.slack, memory.update_lag)
    schedule = candidate.schedule
    cycles = 3 if schedule.flushes else 2 * (schedule.lag + 1) + 8 * len(schedule.workers)
    if cycles * len(schedule.actions) > _MOST_ACTIONS:
        return None
    minibatch_s = steady_s(schedule, candidate.costs, costs.topology, workers=candidate.workers)
    return minibatch_s / case.num_microbatches
