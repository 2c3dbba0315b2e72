"""Transfers and replicas in the simulator; a slow simulator agrees."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_simulator import Slow, chain

from pdjax.schedules import (
    ALGORITHMS,
    Action,
    Schedule,
    gpipe,
    one_f_one_b,
    pipedream,
    zero_bubble_v,
)
from pdjax.simulate import StageCost, simulate
from pdjax.simulate.network import in_turns_over_units
from pdjax.topology.topology import Level, Topology

EQUAL = StageCost(forward_s=1, backward_s=2)


# ---------------------------------------------------------------- transfers


def test_transfers_take_time_and_overlap_with_computing():
    timeline = simulate(gpipe(2, 3), chain(2, size=4), Topology.uniform(2, 2.0))
    # 0F0 at 0, on its way from 1 to 3; then a microbatch every 2 s
    assert [span.start_s for span in timeline.spans_of(1)] == [3, 5, 7, 8, 10, 12, 14]
    sent = [t for t in timeline.transfers if t.kind == "F"]
    assert [(t.start_s, t.end_s) for t in sent] == [(1, 3), (3, 5), (5, 7)]
    assert timeline.link_bytes == {(0, 1): 12, (1, 0): 12}
    assert timeline.spans_of(0)[3].start_s == 12  # 1B2 is done at 10


def test_without_a_topology_transfers_take_no_time():
    timeline = simulate(gpipe(2, 3), chain(2, size=4))
    assert timeline.makespan_s == 12
    assert {t.start_s == t.end_s for t in timeline.transfers} == {True}
    assert timeline.link_bytes == {(0, 1): 12, (1, 0): 12}


def test_nothing_travels_between_stages_of_a_worker():
    timeline = simulate(zero_bubble_v(2, 3), chain(2, size=4), Topology.uniform(1, 1.0))
    assert timeline.transfers == ()
    assert timeline.makespan_s == 18


def test_links_out_are_each_their_own_and_in_both_directions():
    """A worker that receives from both sides, and sends to both, is not held up."""
    slow, fast = (
        simulate(one_f_one_b(3, 6), chain(3, size=1), Topology.uniform(3, speed))
        for speed in (1.0, 1e9)
    )
    starts = {(t.source, t.kind): [] for t in slow.transfers}
    for t in slow.transfers:
        assert t.end_s - t.start_s == 1
        starts[t.source, t.kind].append(t)
    assert fast.makespan_s < slow.makespan_s
    both = sorted([*starts[1, "F"], *starts[1, "B"]], key=lambda t: t.start_s)
    assert all(a.end_s <= b.start_s for a, b in pairwise(both))  # one link out


def test_what_skips_a_stage_goes_directly():
    """The last of three stages waits for the first one's activations, too."""
    costs = chain(3, size=1)
    costs[0] = replace(costs[0], sends=((2, 10), (1, 1)))
    timeline = simulate(gpipe(3, 1), costs, Topology.uniform(3, 1.0))
    # 0F0 ends at 1; to stage 2 until 11, behind it to stage 1 until 12; 1F0 until 13, sent until 14
    assert [span.start_s for span in timeline.spans if span.kind == "F"] == [0, 12, 14]
    other = [*costs[:2], replace(costs[2], returns=((1, 1), (0, 7)))]
    timeline = simulate(gpipe(3, 1), other, Topology.uniform(3, 1.0))
    # 2B0 ends at 17; to stage 1 until 18, to stage 0 until 25; 1B0 is there at 21
    assert timeline.spans_of(0)[1].start_s == 25


def test_workers_of_a_host_share_its_link():
    """Two hosts of two: stages 0 and 1 both send to the other host, at the same time."""
    schedule = Schedule.parse("""
        worker 0: 0F0 0B0
        worker 1: 1F0 1B0
        worker 2: 2F0 2B0
        worker 3: 3F0 3B0
    """)
    costs = [
        StageCost(1, 0, sends=((2, 6),)),
        StageCost(0, 0, sends=((3, 2),)),
        StageCost(0, 0),
        StageCost(0, 0),
    ]
    topology = Topology((Level(2, 64.0), Level(2, 2.0)))
    timeline = simulate(schedule, costs, topology)
    assert [(t.source, t.start_s, t.end_s) for t in timeline.transfers] == [(0, 1, 4), (1, 4, 5)]
    apart = simulate(schedule, costs, topology, workers=(0, 2, 1, 3))  # 0 and 2 on a host
    assert [(t.source, t.end_s - t.start_s) for t in apart.transfers] == [(0, 6 / 64), (1, 2 / 64)]


def test_the_innermost_level_that_joins_both_is_used():
    topology = Topology((Level(2, 4.0), Level(2, 2.0), Level(2, 1.0)))
    costs = chain(2, size=8)
    for workers, seconds in (((0, 1), 2), ((0, 2), 4), ((0, 3), 4), ((3, 4), 8), ((7, 0), 8)):
        timeline = simulate(gpipe(2, 1), costs, topology, workers=workers)
        assert [t.end_s - t.start_s for t in timeline.transfers] == [seconds] * 2


# ---------------------------------------------------------------- replicas


def test_data_parallelism():
    """One stage on four workers: each round 3 s, then 2 * 3/4 of 8 bytes at 2 bytes/s."""
    cost = replace(EQUAL, gradient_bytes=8, update_s=1)
    schedule = pipedream(1, replicas=(4,))
    timeline = simulate(schedule, [cost], Topology.uniform(4, 2.0), num_minibatches=8)
    # the second round's forward pass waits for the first one's update
    assert timeline.makespan_s == 2 * (3 + 6 + 1)
    sent = [t for t in timeline.transfers if t.kind == "R"]
    assert [(t.source, t.target) for t in sent[:4]] == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert {(t.num_bytes, t.start_s, t.end_s) for t in sent[:4]} == {(12, 3, 9)}
    shared = simulate(one_f_one_b(1, 8, replicas=(4,)), [cost], Topology.uniform(4, 2.0))
    assert shared.makespan_s == 2 * 3 + 6 + 1


def test_an_all_reduce_takes_the_slowest_link_and_waits_for_the_one_before():
    cost = replace(EQUAL, gradient_bytes=16)
    topology = Topology((Level(2, 100.0), Level(2, 1.0)))
    schedule = pipedream(2, replicas=(2, 1))
    costs = [cost, StageCost(1, 1)]
    inside = simulate(schedule, costs, topology, num_minibatches=8, workers=(0, 1, 2))
    across = simulate(schedule, costs, topology, num_minibatches=8, workers=(0, 2, 1))
    for timeline, seconds in ((inside, 0.16), (across, 16.0)):
        rounds = sorted({(t.start_s, t.end_s) for t in timeline.transfers if t.kind == "R"})
        assert [stop - start for start, stop in rounds] == pytest.approx([seconds] * 4)
        assert all(a[1] <= b[0] for a, b in pairwise(rounds))
        updates = [s.start_s for s in timeline.spans if (s.kind, s.stage) == ("U", 0)]
        assert sorted({*updates}) == [stop for _, stop in rounds]


def test_the_slowest_link_of_a_ring_counts():
    """Three replicas, the third one on another host: 16 bytes at 1 byte/s."""
    topology = Topology((Level(2, 100.0), Level(2, 1.0)))
    cost = replace(EQUAL, gradient_bytes=12)
    timeline = simulate(one_f_one_b(1, 3, replicas=(3,)), [cost], topology)
    assert timeline.makespan_s == 3 + 16


def test_a_broken_off_round_is_reduced_too():
    schedule = pipedream(2, replicas=(2, 1))
    timeline = simulate(schedule, [EQUAL] * 2, num_minibatches=5)
    updates = [s.microbatch for s in timeline.spans_of(1) if s.kind == "U"]
    assert updates == [1, 3, 4]  # the last one without a gradient of its own


def test_replicas_on_several_hosts_take_turns():
    topology = Topology.parse("2x2x2@4B/s,2B/s,1B/s")
    assert in_turns_over_units((0, 1, 2, 3), None) == [0, 1, 2, 3]
    assert in_turns_over_units(range(8), topology) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert in_turns_over_units((2, 3, 6, 7), topology) == [2, 6, 3, 7]
    assert in_turns_over_units((3, 6, 7), topology) == [3, 6, 7]


# ---------------------------------------------------------------- another simulator


@st.composite
def schedules(draw) -> Schedule:
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    name = draw(st.sampled_from([*ALGORITHMS, "replicated"]))
    if name != "replicated":
        algorithm = ALGORITHMS[name]
        chunks = algorithm.num_chunks
        m = max(m, n) if name == "pipedream_2bw" else m
        return algorithm.make(n * chunks, m if algorithm.divides else 1)
    replicas = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    slack = draw(st.integers(0, 1))
    if draw(st.booleans()):
        return one_f_one_b(n, m, replicas=replicas, slack=slack)
    lag = draw(st.integers(0, 2))
    return pipedream(n, replicas=replicas, slack=slack, update_lag=lag)


@st.composite
def topologies(draw, num_workers: int) -> Topology | None:
    speeds = st.sampled_from([0.5, 1.0, 2.0])
    inner = draw(st.sampled_from([0, 1, 2, 3, num_workers]))
    if inner == 0:
        return None
    levels = (Level(inner, draw(speeds)), Level(-(-num_workers // inner), draw(speeds)))
    return Topology(levels)


def random_costs(num_stages: int, seed: int) -> list[StageCost]:
    """Whole numbers, zeros among them, so that all sums are exact and many things coincide."""
    rng = random.Random(seed)

    def pairs(stages):
        chosen = [(stage, rng.randint(0, 6)) for stage in stages if rng.random() < 0.6]
        return tuple(rng.sample(chosen, len(chosen)))

    return [
        StageCost(
            *(rng.choice([0, 1, 2, 3, 5]) for _ in range(5)),
            gradient_bytes=12 * rng.randint(0, 3),
            sends=pairs(range(stage + 1, num_stages)),
            returns=pairs(range(stage)),
        )
        for stage in range(num_stages)
    ]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_slow_simulator_agrees(data):
    schedule = data.draw(schedules())
    count = len(schedule.workers)
    topology = data.draw(topologies(count))
    places = list(range(count))
    if topology is not None:
        places = data.draw(st.permutations(range(topology.num_workers)))[:count]
    costs = random_costs(schedule.num_stages, data.draw(st.integers(0, 10**6)))
    num_minibatches = data.draw(st.integers(1, 5))
    timeline = simulate(schedule, costs, topology, num_minibatches=num_minibatches, workers=places)
    slow = Slow(schedule, costs, topology, num_minibatches, places)
    spans = {
        (s.worker, Action(s.kind, s.stage, s.microbatch)): (s.start_s, s.end_s)  # type: ignore[arg-type]
        for s in timeline.spans
    }
    assert spans == slow.spans
    assert sorted(map(tuple, timeline.transfers)) == sorted(slow.transfers)
