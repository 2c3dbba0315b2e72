"""The fastest plan that fits: PipeDream's planner, exact, with memory charged in full.

The time of a plan is that of its slowest part (SOSP 2019, section 3.1). Whether some plan takes at
most a given time is easy to say (`Laying`), and the best time is found by bisection. The search
ends at a plan whose own time nothing beats. Only nested plans are looked at: a part of an outer
level is a pipeline of its own on the units inside.

Memory is left out at first; if the plan that is found fits, it is the best of those that fit, too.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pdjax.planner.cost_model import Costs, Part
from pdjax.planner.laying import Laying, Wish
from pdjax.planner.narrowing import narrowed
from pdjax.planner.reach import Reach
from pdjax.planner.tables import Tables

_EXACT = 1e-12  # a plan counts as faster if its time is less by more than this share
_CLOSE = 1e-9  # how closely the best time is closed in
_FACTORS = (1 + _CLOSE, 1.02, 1.1, 1.3, 2.0, 4.0, 16.0, 256.0)  # of the least time


Find = Callable[[float], tuple[Part, ...] | None]
"""Looks for a plan that takes at most some seconds."""


def fastest(
    costs: Costs, *, straight: bool = False, num_stages: int | None = None
) -> tuple[Part, ...] | None:
    """The nested plan with the smallest time that fits, or None if none fits.

    Args:
        costs: the layers and the workers.
        straight: whether to replicate nothing.
        num_stages: exactly how many stages; any number if None.
    """
    tables = Tables(costs)
    wish = Wish(straight, num_stages, charges_memory=False)
    least_s = float(costs.compute_s[-1]) / costs.topology.num_workers
    best = _bisect(costs, Reach(costs, straight=straight).plan, least_s)
    if num_stages is not None and best is not None:
        best = _bisect(costs, lambda s: Laying(tables, s, wish).run(), costs.plan_s(best))
    if best is not None and costs.excess_bytes(best) > 0:
        wish = replace(wish, charges_memory=True)
        best = _bisect(costs, lambda s: Laying(tables, s, wish).run(), costs.plan_s(best))
    if best is None:
        return None
    best = _sending_least(tables, wish, best)
    return _plain(costs, _from_first_unit(costs, narrowed(costs, best)))


def _sending_least(tables: Tables, wish: Wish, best: tuple[Part, ...]) -> tuple[Part, ...]:
    """Of equally fast plans, some of which are looked for, the one that sends the fewest bytes.

    Where layers are alike, as in most deep models, a straight pipeline and data parallelism often
    are as fast as what lies between.
    """
    costs = tables.costs
    limit_s = costs.plan_s(best) * (1 + _CLOSE)
    found = [best, _straight(tables, limit_s, wish)]
    single = replace(wish, charges_memory=_limits(costs), num_stages=wish.num_stages or 1)
    found.append(Laying(tables, limit_s, single).run())
    return min(
        (parts for parts in found if parts is not None),
        key=lambda parts: sum(map(costs.wire_bytes, costs.stages(parts))),
    )


def _straight(tables: Tables, limit_s: float, wish: Wish) -> tuple[Part, ...] | None:
    """A straight plan that takes at most `limit_s` and fits."""
    costs = tables.costs
    found = Reach(costs, straight=True).plan(limit_s)
    if found is None or (wish.num_stages is None and costs.excess_bytes(found) == 0):
        return found
    wish = replace(wish, straight=True, charges_memory=_limits(costs))
    return Laying(tables, limit_s, wish).run()


def _limits(costs: Costs) -> bool:
    return bool(costs.topology.memory_bytes)


def fits(costs: Costs, *, straight: bool = False, num_stages: int | None = None) -> bool:
    """Whether some plan fits, whatever time it takes; arguments as in `fastest`."""
    wish = Wish(straight, num_stages)
    return Laying(Tables(costs), float("inf"), wish).run() is not None


def least_excess(
    costs: Costs, *, straight: bool = False, num_stages: int | None = None
) -> tuple[Part, ...] | None:
    """The plan that comes nearest to fitting, whatever time it takes; None if there is no plan."""
    tables = Tables(costs)
    wish = Wish(straight, num_stages, charges_memory=False)
    best = Laying(tables, float("inf"), wish).run()
    if best is None:
        return None
    low, high = 0.0, costs.excess_bytes(best)
    while high - low > 0.5 and high - low > 1e-9 * high:
        middle = (low + high) / 2
        found = Laying(
            tables, float("inf"), replace(wish, charges_memory=True, extra_bytes=middle)
        ).run()
        if found is None:
            low = middle
        else:
            best, high = found, costs.excess_bytes(found)
    return _from_first_unit(costs, best)


def _bisect(costs: Costs, find: Find, known_s: float) -> tuple[Part, ...] | None:
    """The plan with the smallest time; nothing takes less than `known_s`.

    Args:
        costs: the layers and the workers.
        find: a plan that takes at most some seconds, give or take rounding.
        known_s: seconds.
    """
    low, best = _bracket(find, known_s)
    if best is None:
        return None
    high, rounds = costs.plan_s(best), 0
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
    the more there is to be looked at.
    """
    low = known_s
    for factor in _FACTORS if known_s > 0 else ():
        found = find(known_s * factor)
        if found is not None:
            return low, found
        low = known_s * factor
    return low, find(float("inf"))


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
