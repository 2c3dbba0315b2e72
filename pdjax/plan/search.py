"""The fastest plan that fits: PipeDream's planner, exact, with memory charged in full.

The time of a plan is that of its slowest part (SOSP 2019, section 3.1). `FeasibilitySearch` decides
whether some plan takes at most a given time, and the best time is found by bisection. The search
ends at a plan that no other one beats. Only nested plans are searched: a part of an outer level is
a pipeline of its own on the units inside.

Memory is left out at first; if the plan that is found fits, it is the best of those that fit, too.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pdjax.plan.cost_model import Costs, Part
from pdjax.plan.feasible import Constraints, FeasibilitySearch
from pdjax.plan.lookup import LookupTables
from pdjax.plan.reach import Reach
from pdjax.plan.refine_cuts import refine_cuts

_EXACT = 1e-12  # a plan counts as faster if its time is less by more than this share
_CLOSE = 1e-9  # how closely the best time is closed in
_FACTORS = (1 + _CLOSE, 1.02, 1.1, 1.3, 2.0, 4.0, 16.0, 256.0)  # of the least time
_LONG = 1.2  # a factor above which it is first seen if any time is long enough


Find = Callable[[float], tuple[Part, ...] | None]
"""Looks for a plan that takes at most some seconds."""


def fastest(
    costs: Costs, *, replicate: bool = True, num_stages: int | None = None
) -> tuple[Part, ...] | None:
    """The nested plan with the smallest time that fits, or None if none fits.

    Args:
        costs: the layers and the workers.
        replicate: whether stages may be replicated.
        num_stages: exactly how many stages; any number if None.
    """
    tables = LookupTables(costs)
    reach = Reach(costs, replicate=replicate)
    least_s = float(costs.compute_s[-1]) / costs.topology.num_workers
    best = _bisect(costs, reach.plan, least_s)
    constraints = Constraints(replicate, charges_memory=False)
    if num_stages is not None and best is not None:
        constraints = replace(constraints, num_stages=num_stages)
        best = _fastest_of(tables, constraints, costs.plan_s(best))
    if best is not None and costs.excess_bytes(best) > 0:
        constraints = replace(constraints, charges_memory=True)
        best = _fastest_of(tables, constraints, costs.plan_s(best))
    if best is None:
        return None
    best = _sending_least(tables, constraints, best)
    return _plain(costs, _from_first_unit(costs, refine_cuts(costs, best)))


def _fastest_of(
    tables: LookupTables, constraints: Constraints, known_s: float
) -> tuple[Part, ...] | None:
    """The fastest plan as wished; nothing takes less than `known_s`.

    With a number of stages, one is first looked for among the likely plans, and then it is proved
    that none is faster: mostly because none of as many or fewer stages is.
    """
    costs = tables.costs
    if constraints.num_stages is None:
        return _bisect(costs, lambda s: FeasibilitySearch(tables, s, constraints).run(), known_s)
    if constraints.charges_memory:
        any_number = replace(constraints, num_stages=None)
        free = _bisect(costs, lambda s: FeasibilitySearch(tables, s, any_number).run(), known_s)
        if free is None:
            return None
        known_s = max(known_s, costs.plan_s(free))
    likely = replace(constraints, counting="likely")
    best = _bisect(costs, lambda s: FeasibilitySearch(tables, s, likely).run(), known_s)
    return _bisect(costs, lambda s: _exactly(tables, s, constraints), known_s, best)


def _lay(tables: LookupTables, limit_s: float, constraints: Constraints) -> tuple[Part, ...] | None:
    """A plan as wished that takes at most `limit_s`; None if there is none."""
    if constraints.num_stages is None:
        return FeasibilitySearch(tables, limit_s, constraints).run()
    found = FeasibilitySearch(tables, limit_s, replace(constraints, counting="likely")).run()
    return found or _exactly(tables, limit_s, constraints)


def _exactly(
    tables: LookupTables, limit_s: float, constraints: Constraints
) -> tuple[Part, ...] | None:
    """The same, with the search over all partial plans only if one of fewer stages exists."""
    found = FeasibilitySearch(tables, limit_s, replace(constraints, counting="at_most")).run()
    if found is None or len(tables.costs.stages(found)) == constraints.num_stages:
        return found
    return FeasibilitySearch(tables, limit_s, constraints).run()


def _sending_least(
    tables: LookupTables, constraints: Constraints, best: tuple[Part, ...]
) -> tuple[Part, ...]:
    """Of equally fast plans, some of which are looked for, the one that sends the fewest bytes.

    Where layers are alike, as in most deep models, a straight pipeline and data parallelism often
    are as fast as what lies between.
    """
    costs = tables.costs
    limit_s = costs.plan_s(best) * (1 + _CLOSE)
    constraints = replace(
        constraints, charges_memory=bool(costs.topology.memory_bytes), counting="likely"
    )
    found = [best, _straight(tables, limit_s, constraints)]
    if constraints.num_stages is None:
        found.append(FeasibilitySearch(tables, limit_s, replace(constraints, num_stages=1)).run())
    return min(
        (parts for parts in found if parts is not None),
        key=lambda parts: sum(map(costs.wire_bytes, costs.stages(parts))),
    )


def _straight(
    tables: LookupTables, limit_s: float, constraints: Constraints
) -> tuple[Part, ...] | None:
    """A straight plan that takes at most `limit_s` and fits."""
    found = Reach(tables.costs, replicate=False).plan(limit_s)
    if found is None or (constraints.num_stages is None and tables.costs.excess_bytes(found) == 0):
        return found
    return FeasibilitySearch(tables, limit_s, replace(constraints, replicate=False)).run()


def fits(costs: Costs, *, replicate: bool = True, num_stages: int | None = None) -> bool:
    """Whether some plan fits, whatever time it takes; arguments as in `fastest`."""
    constraints = Constraints(replicate, num_stages)
    return _lay(LookupTables(costs), float("inf"), constraints) is not None


def least_excess(
    costs: Costs, *, replicate: bool = True, num_stages: int | None = None
) -> tuple[Part, ...] | None:
    """The plan that comes nearest to fitting, whatever time it takes; None if there is no plan."""
    tables = LookupTables(costs)
    constraints = Constraints(replicate, num_stages, charges_memory=False)
    best = _lay(tables, float("inf"), constraints)
    if best is None:
        return None
    low, high = 0.0, costs.excess_bytes(best)
    while high - low > 0.5 and high - low > 1e-9 * high:
        middle = (low + high) / 2
        found = _lay(
            tables, float("inf"), replace(constraints, charges_memory=True, extra_bytes=middle)
        )
        if found is None:
            low = middle
        else:
            best, high = found, costs.excess_bytes(found)
    return _from_first_unit(costs, best)


def _bisect(
    costs: Costs, find: Find, known_s: float, best: tuple[Part, ...] | None = None
) -> tuple[Part, ...] | None:
    """The plan with the smallest time; nothing takes less than `known_s`.

    Args:
        costs: the layers and the workers.
        find: a plan that takes at most some seconds, give or take rounding.
        known_s: seconds.
        best: a plan that is known; if given, it is first seen whether any is faster.
    """
    low, rounds = known_s, 3
    if best is None:
        rounds = 0
        low, best = _bracket(find, known_s)
    if best is None:
        return None
    high = costs.plan_s(best)
    while low < high * (1 - _EXACT) and high - low > high * _CLOSE:
        rounds += 1
        # Once in a while, look if anything at all is faster: mostly this ends the search early.
        middle = high * (1 - _EXACT) if rounds % 4 == 0 else (low + high) / 2
        found = find(middle)
        if found is not None and costs.plan_s(found) < high:
            best, high = found, costs.plan_s(found)
        elif rounds % 4 == 0:
            break
        else:
            low = middle
    return best


def _bracket(find: Find, known_s: float) -> tuple[float, tuple[Part, ...] | None]:
    """A time that is too short for any plan, and a plan that does not take much longer.

    Plans are mostly tight: it is tried a little above `known_s` first, as the more time there is,
    the more there is to be looked at. Before long times are tried, it is seen if any will do.
    """
    low, endless = known_s, None
    for factor in _FACTORS if known_s > 0 else ():
        if factor > _LONG and endless is None:
            endless = find(float("inf"))
            if endless is None:
                break
        found = find(known_s * factor)
        if found is not None:
            return low, found
        low = known_s * factor
    return low, endless if known_s > 0 else find(float("inf"))


def _plain(costs: Costs, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The plan without the repeated forward passes that memory does not ask for."""
    if costs.memory.remat == "full":
        return parts
    remat = {}
    for stage in costs.stages(parts):
        fits = costs.stage_bytes(replace(stage, remat=False)) <= costs.limit_bytes(stage.workers)
        remat[stage.first] = stage.remat and not fits

    def mend(part: Part) -> Part:
        inner = tuple(map(mend, part.inner))
        return replace(part, inner=inner, remat=not inner and remat[part.first])

    return tuple(map(mend, parts))


def _from_first_unit(costs: Costs, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The plan on the first units of each level, if all workers are alike."""
    if len(set(costs.topology.memory_bytes)) > 1:
        return parts
    free = min(part.unit for part in parts)

    def move(part: Part) -> Part:
        inner = _from_first_unit(costs, part.inner) if part.inner else ()
        return replace(part, unit=part.unit - free, inner=inner)

    return tuple(map(move, parts))
