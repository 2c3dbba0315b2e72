"""The planner against brute force, over everything that it may choose from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdjax.plan import cost_model, feasible, lookup
from pdjax.plan.cost_model import CostForm, Costs, MemoryForm, Part
from pdjax.plan.pareto import PARENT, drop_dominated, make_rows
from pdjax.plan.search import fastest
from pdjax.profile import LayerProfile, Profile
from pdjax.topology import Level, Topology


def every_plan(
    costs: Costs, first: int, stop: int, level: int, replicate: bool = True
) -> Iterator[tuple[Part, ...]]:
    """All nested pipelines of the layers first … stop on the units of a level."""
    units = costs.topology.levels[level].num_units
    for count in range(1, min(units, stop - first) + 1):
        for cuts in itertools.combinations(range(first + 1, stop), count - 1):
            bounds = [first, *cuts, stop]
            most = units if replicate else 1
            for replicas in itertools.product(range(1, most + 1), repeat=count):
                for starts in _places(replicas, units):
                    yield from _fill(costs, bounds, replicas, starts, level, replicate)


def _places(replicas, units, start=0):
    """All ways to put parts onto units in order, with idle units before, between and after."""
    if not replicas:
        yield ()
        return
    for unit in range(start, units - sum(replicas) + 1):
        for rest in _places(replicas[1:], units, unit + replicas[0]):
            yield (unit, *rest)


def _fill(costs, bounds, replicas, starts, level, replicate):
    choices = []
    for (a, b), m, unit in zip(itertools.pairwise(bounds), replicas, starts, strict=True):
        if level == 0:
            choices.append([Part(a, b, m, unit, remat=remat) for remat in (False, True)])
        else:
            inner = every_plan(costs, a, b, level - 1, replicate)
            choices.append([Part(a, b, m, unit, parts) for parts in inner])
    yield from itertools.product(*choices)


layers = st.lists(
    st.builds(
        LayerProfile,
        name=st.just("layer"),
        forward_s=st.integers(0, 20).map(float),
        backward_s=st.integers(0, 20).map(float),
        cut_bytes=st.integers(0, 60).map(float),
        param_bytes=st.integers(0, 20).map(float),
        stash_bytes=st.integers(0, 30).map(float),
    ),
    min_size=1,
    max_size=7,
)
one_level = st.builds(
    lambda units, bandwidth: (Level(units, bandwidth),),
    st.integers(1, 6),
    st.sampled_from([0.5, 2.0, 20.0]),
)
two_levels = st.builds(
    lambda shape, inner, outer: (Level(shape[0], inner), Level(shape[1], outer)),
    st.sampled_from([(2, 2), (3, 2), (2, 3)]),
    st.sampled_from([2.0, 20.0]),
    st.sampled_from([0.5, 2.0]),
)


def check(profile_layers, levels, cost, memory, shares, replicate=True, num_stages=None, cuts=()):
    """`shares`: each worker's memory, as a share of what the best plan without limits needs."""
    profile = Profile(tuple(profile_layers))
    costs = Costs(profile, Topology(levels), cost, memory, cuts)
    free = fastest(costs, replicate=replicate)
    assert free is not None
    if shares is not None:
        most = max(map(costs.stage_bytes, costs.stages(free)))
        sizes = [max(1, int(most * share)) for share in shares]
        costs = costs.changed(topology=Topology(levels, tuple(sizes[: costs.topology.num_workers])))
    top = len(levels) - 1
    fitting = [
        costs.plan_s(parts)
        for parts in every_plan(costs, 0, costs.num_layers, top, replicate)
        if allowed(costs, parts, num_stages)
    ]
    best = fastest(costs, replicate=replicate, num_stages=num_stages)
    if not fitting:
        assert best is None
        return
    assert best is not None
    assert allowed(costs, best, num_stages)
    assert costs.plan_s(best) == pytest.approx(min(fitting), rel=1e-8)
    if memory.remat == "auto":
        assert not any(stage.remat and fits_without(costs, stage) for stage in costs.stages(best))


def fits_without(costs, stage):
    plain = replace(stage, remat=False)
    return costs.stage_bytes(plain) <= costs.limit_bytes(stage.workers)


def allowed(costs, parts, num_stages):
    stages = costs.stages(parts)
    return (
        num_stages in (None, len(stages))
        and all(math.isfinite(costs.width_bytes[stage.first]) for stage in stages)
        and all(stage.remat for stage in stages if costs.memory.remat == "full")
        and not any(stage.remat for stage in stages if costs.memory.remat == "none")
        and costs.excess_bytes(parts) == 0
    )


memories = st.one_of(
    st.none(),
    st.floats(0.2, 1.1).map(lambda share: [share] * 6),
    st.lists(st.floats(0.1, 1.5), min_size=6, max_size=6),
)
forms = st.builds(
    CostForm,
    overlap=st.booleans(),
    sync=st.sampled_from(["ring", "paper", "original"]),
    activations=st.booleans(),
    num_microbatches=st.sampled_from([None, 3, 8]),
)
memory_forms = st.one_of(
    st.builds(
        MemoryForm,
        stashes=st.booleans(),
        num_microbatches=st.sampled_from([None, 2, 8]),
        optimizer_bytes_per_param_byte=st.sampled_from([0.0, 2.0]),
        remat=st.sampled_from(["auto", "none", "full"]),
    ),
    st.just(MemoryForm(stashes=False, num_microbatches=3, keeps_all=True)),
)
stage_counts = st.sampled_from([None, None, 1, 2, 3])
ranges = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted).map(tuple), max_size=2
)


@settings(deadline=None, max_examples=100)
@given(layers, one_level, forms, memory_forms, memories, st.booleans(), stage_counts, ranges)
def test_one_level_equals_brute_force(found, levels, cost, memory, sizes, replicate, count, cuts):
    cuts = [(a, min(b, len(found) - 1)) for a, b in cuts if a < len(found)]
    check(found, levels, cost, memory, sizes, replicate, count, cuts)


@settings(deadline=None, max_examples=60)
@given(
    layers.filter(lambda found: len(found) <= 4),
    two_levels,
    forms,
    memory_forms,
    memories,
    st.booleans(),
    stage_counts,
    ranges,
)
def test_two_levels_equal_brute_force(found, levels, cost, memory, sizes, replicate, count, cuts):
    cuts = [(a, min(b, len(found) - 1)) for a, b in cuts if a < len(found)]
    check(found, levels, cost, memory, sizes, replicate, count, cuts)


@pytest.mark.parametrize("num_workers", [2, 4, 5, 20])
def test_equal_layers_divide_evenly(num_workers):
    """Nothing is left over in such a plan: each worker is busy all the time."""
    profile = Profile((LayerProfile("layer", 1.0, 2.0, 0.0, 1.0),) * 20)
    topology = Topology.uniform(num_workers, 1e9)
    costs = Costs(profile, topology, CostForm(), MemoryForm())
    best = fastest(costs, replicate=False)
    assert best is not None
    assert costs.plan_s(best) == pytest.approx(60 / num_workers)


def test_of_equally_fast_plans_a_straight_one_that_sends_less_is_taken():
    profile = Profile((LayerProfile("layer", 1.0, 1.0, 4.0, 8.0),) * 4)
    costs = Costs(profile, Topology.uniform(4, 100.0), CostForm(), MemoryForm())
    best = fastest(costs)
    assert best is not None
    assert [part.replicas for part in best] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("narrow", "firsts"),
    [((4,), (0, 1, 4, 6)), ((3, 6), (0, 1, 3, 6)), ((3, 7), (0, 1, 4, 7))],
)
def test_cuts_fall_where_few_bytes_cross_if_that_takes_no_longer(narrow, firsts):
    """The first layer sets the time to 3 s; the others, of 1 s each, have room for one more.

    Cutting before 3 and before 7 would send the least, but take 4 s between them.
    """
    widths = [0.0 if at + 1 in narrow else 9.0 + at for at in range(9)]
    seconds = [3.0] + [1.0] * 8
    rows = zip(seconds, widths, strict=True)
    layers = tuple(LayerProfile("layer", s, 0.0, w, 0.0) for s, w in rows)
    costs = Costs(Profile(layers), Topology.uniform(4, 100.0), CostForm(), MemoryForm())
    best = fastest(costs, replicate=False, num_stages=4)
    assert best is not None
    assert costs.plan_s(best) == 3.0
    assert tuple(part.first for part in best) == firsts


def test_a_cut_may_be_too_wide_for_the_outer_level_only(monkeypatch):
    """Found by searching for a case in which the levels of a cut matter to what is kept."""
    rows = [(7, 0, 64, 3, 4), (0, 8, 52, 0, 2), (0, 3, 65, 2, 4), (2, 9, 42, 3, 5)]
    profile = Profile(tuple(LayerProfile(f"layer_{i}", *row) for i, row in enumerate(rows)))
    topology = Topology((Level(2, 20.0), Level(2, 5.0)), (26,) * 4)
    for module in (cost_model, lookup):
        monkeypatch.setattr(module, "BUFFERS", 0)
    memory = MemoryForm(stashes=False, remat="none")
    costs = Costs(profile, topology, CostForm(), memory)
    best = fastest(costs)
    assert best is not None
    assert costs.plan_s(best) == pytest.approx(20.8)


one_row = st.tuples(*(st.integers(0, 3) for _ in range(5)))
row_tables = st.lists(one_row, min_size=1, max_size=40).map(np.array)


@settings(deadline=None)
@given(row_tables)
def test_what_is_worth_keeping(table):
    """Against the rule, row by row."""
    origin, first, demand, burden, levels = table.T
    rows = make_rows(len(table), origin=origin, first=first, demand=demand)
    rows[:, PARENT] = np.arange(len(table))
    kept = {tuple(table[number]) for number in drop_dominated(rows, burden, levels)[:, PARENT]}
    every = set(map(tuple, table.tolist()))

    def beats(one, other):
        no_worse = all(a <= b for a, b in zip(one[1:4], other[1:4], strict=True))
        return one != other and one[0] == other[0] and no_worse and one[4] >= other[4]

    assert kept == {row for row in every if not any(beats(other, row) for other in every)}


def drifting_layers(count):
    """Work, cuts, weights and stash that vary, and no two cuts equally wide."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(0.0, 0.8, (4, count)) * np.array([[0.5], [2e8], [1e9], [1e9]])
    sizes /= np.array([[count], [1], [count], [count]])
    rows = enumerate(sizes.T.tolist())
    return tuple(LayerProfile(f"{i}", s / 3, 2 * s / 3, w, p, b) for i, (s, w, p, b) in rows)


@pytest.mark.parametrize(("share", "num_stages"), [(None, None), (0.7, None), (None, 5)])
def test_few_partial_plans_are_looked_at(monkeypatch, share, num_stages):
    """All-reduces are added: each first layer of a replicated part leaves it another time.

    Trying all of them, without a bound on what is left to be done, looked at 50,000 and more.
    """
    levels = (Level(4, 1e10), Level(4, 1.25e9))
    cost = CostForm(overlap=False)
    costs = Costs(Profile(drifting_layers(120)), Topology(levels), cost, MemoryForm())
    if share is not None:
        free = fastest(costs)
        assert free is not None
        size = int(share * max(map(costs.stage_bytes, costs.stages(free))))
        costs = costs.changed(topology=Topology(levels, (size,) * 16))
    looked_at = 0
    drop_dominated, one_of_each = feasible.drop_dominated, feasible.one_of_each

    def counted(keep):
        def count_rows(rows, *args, **options):
            nonlocal looked_at
            looked_at += len(rows)
            return keep(rows, *args, **options)

        return count_rows

    monkeypatch.setattr(feasible, "drop_dominated", counted(drop_dominated))
    monkeypatch.setattr(feasible, "one_of_each", counted(one_of_each))
    best = fastest(costs, num_stages=num_stages)
    assert best is not None
    assert looked_at <= 1000
