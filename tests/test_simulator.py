"""The simulator: closed forms hold, and a slow simulator agrees."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_simulator import Slow

from pdjax.schedules import (
    ALGORITHMS,
    Action,
    Schedule,
    ScheduleError,
    forward_only,
    gpipe,
    interleaved,
    model_parallel,
    one_f_one_b,
    pipedream,
    pipedream_2bw,
    zero_bubble_h1,
    zero_bubble_v,
)
from pdjax.schedules.versions import delay_of, versions_alive
from pdjax.simulator import StageCost, peak_bytes, simulate, staleness, steady_s
from pdjax.simulator.holding import version_changes
from pdjax.simulator.links import in_turns_over_units
from pdjax.timeline import Timeline
from pdjax.topology import Level, Topology
from pdjax.weights import DOUBLE_BUFFER, LATEST, STASH, VERTICAL_SYNC

SIZES = [(n, m) for n in (1, 2, 3, 5) for m in (1, 2, 3, 4, 8, 12)]
EQUAL = StageCost(forward_s=1, backward_s=2)


def chain(num_stages: int, size: float = 1, **fields) -> list[StageCost]:
    """Equal stages that send `size` bytes each way."""
    cost = replace(EQUAL, **fields)
    return [
        replace(
            cost,
            sends=((stage + 1, size),) if stage + 1 < num_stages else (),
            returns=((stage - 1, size),) if stage else (),
        )
        for stage in range(num_stages)
    ]


def waiting_s(timeline: Timeline) -> list[float]:
    return [timeline.makespan_s - timeline.busy_s(w) for w in range(timeline.num_workers)]


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("order", [gpipe, one_f_one_b])
def test_gpipe_and_1f1b(order, n, m):
    timeline = simulate(order(n, m), [EQUAL] * n)
    assert timeline.makespan_s == 3 * (n + m - 1)
    assert waiting_s(timeline) == [3 * (n - 1)] * n
    assert timeline.bubble_share == pytest.approx((n - 1) / (m + n - 1), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_model_parallelism(n, m):
    timeline = simulate(model_parallel(n, m), [EQUAL] * n)
    assert timeline.makespan_s == 3 * n * m
    assert timeline.bubble_share == pytest.approx(1 - 1 / n, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_bubble_of_interleaved_is_divided_by_the_chunks(n, v, groups):
    """(n - 1) / v times both passes of all stages of a worker."""
    stages = [StageCost(forward_s=2, backward_s=4)] * (n * v)
    timeline = simulate(interleaved(n * v, groups * n, num_chunks=v), stages)
    both_passes_s = v * 6
    assert waiting_s(timeline) == [(n - 1) * both_passes_s / v] * n


@pytest.mark.parametrize(("n", "m"), [(n, m) for n, m in SIZES if m >= n])
def test_the_bubble_of_zero_bubble_h1_is_a_third(n, m):
    timeline = simulate(zero_bubble_h1(n, m), [EQUAL] * n)
    assert timeline.makespan_s == 3 * m + n - 1
    assert waiting_s(timeline) == [n - 1] * n


@pytest.mark.parametrize(("n", "m"), [(n, m) for n, m in SIZES if m >= 2 * n - 1])
def test_zero_bubble_v(n, m):
    timeline = simulate(zero_bubble_v(2 * n, m), [EQUAL] * (2 * n))
    assert timeline.makespan_s == 2 * 3 * m + n - 1


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("order", [pipedream, lambda n: pipedream_2bw(n, n + 1)])
def test_no_bubble_once_under_way(order, n):
    schedule = order(n)
    count = 6 * n
    timeline = simulate(schedule, [EQUAL] * n, num_minibatches=count)
    assert steady_s(schedule, [EQUAL] * n) == 3 * schedule.num_microbatches
    # every worker goes without a pause from its first backward pass until the forwards end
    for worker in range(n):
        spans = timeline.spans_of(worker)
        first = next(at for at, span in enumerate(spans) if span.kind == "B")
        last = max(at for at, span in enumerate(spans) if span.kind == "F")
        assert all(a.end_s == b.start_s for a, b in pairwise(spans[first:last]))


def test_steady_seconds_of_uneven_stages_are_those_of_the_slowest():
    costs = [StageCost(1, 2), StageCost(3, 4, update_s=1), StageCost(2, 2)]
    assert steady_s(pipedream(3), costs) == 8
    assert steady_s(pipedream_2bw(3, 4), costs) == 4 * 7 + 1
    assert steady_s(one_f_one_b(3, 4), costs) == simulate(one_f_one_b(3, 4), costs).makespan_s


@pytest.mark.parametrize(
    ("replicas", "expected_s"),
    [
        ((2, 1), (3, 3, 3)),
        ((2, 2), (3, 3, 3)),
        ((15, 1), (3, 3, 3)),
        ((1, 2), (15 / 4, 3, 3)),
        ((1, 3), (4, 3.5, 3)),
        ((1, 3, 1), (4, 3.5, 3)),
        ((4, 2, 1, 1), (21 / 4, 3, 3)),
    ],
)
def test_slack_brings_replicated_pipedream_to_the_predicted_rate(replicas, expected_s):
    """Balanced stages, which take 3 s for each microbatch with all their replicas."""
    costs = [StageCost(r, 2 * r) for r in replicas]
    schedules = [pipedream(len(replicas), replicas=replicas, slack=slack) for slack in range(3)]
    assert tuple(steady_s(schedule, costs) for schedule in schedules) == expected_s


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_microbatches_in_flight(n, m):
    costs = [replace(EQUAL, stash_bytes=1)] * n
    for schedule, peaks in (
        (gpipe(n, m), [m] * n),
        (one_f_one_b(n, m), [min(n - stage, m) for stage in range(n)]),
        (model_parallel(n, m), [1] * n),
        (zero_bubble_h1(n, m), [min(n - stage, m) for stage in range(n)]),
    ):
        assert list(peak_bytes(schedule, costs)) == peaks
        timeline = simulate(schedule, costs)
        assert [timeline.peak_bytes(worker) for worker in range(n)] == peaks


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_versions_of_the_weights(n):
    costs = [replace(EQUAL, param_bytes=1)] * n
    for schedule, rule, peaks in (
        (pipedream(n), STASH, [n - stage for stage in range(n)]),
        (pipedream(n), VERTICAL_SYNC, [n] * n),
        (pipedream_2bw(n, n + 1), DOUBLE_BUFFER, [2] * n),
        (one_f_one_b(n, 4), LATEST, [1] * n),
    ):
        assert list(peak_bytes(schedule, costs, rule)) == peaks
        timeline = simulate(schedule, costs, rule=rule, num_minibatches=4 * n)
        assert [timeline.peak_bytes(worker) for worker in range(n)] == peaks


def test_staleness():
    assert staleness(pipedream(4), STASH) == (3, 2, 1, 0)
    assert staleness(pipedream(4), VERTICAL_SYNC) == (3, 3, 3, 3)
    assert staleness(pipedream_2bw(4, 5), DOUBLE_BUFFER) == (1, 1, 1, 1)
    assert staleness(pipedream(3, replicas=(1, 3, 1)), STASH) == (6, 1, 0)
    assert staleness(gpipe(4, 4), LATEST) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("num_stages", [2, 6])
def test_versions_after_every_action_are_those_that_are_alive(name, num_stages):
    algorithm = ALGORITHMS[name]
    schedule = algorithm.make(num_stages, 7 if algorithm.divides else 1)
    rule, count = algorithm.weight_rule, schedule.num_microbatches
    delay = delay_of(rule, schedule)
    columns = schedule.unrolled(9)
    changes = version_changes(columns, rule, count, delay)
    for worker, actions in enumerate(schedule.unroll(9)):
        for stage in schedule.stages_of(worker):
            mine = (columns.worker == worker) & (columns.stage == stage)
            counted = 1 + np.cumsum(np.where(mine, changes, 0)[columns.worker == worker])
            assert counted.tolist() == versions_alive(actions, stage, rule, count, delay)


def test_the_parts_of_a_peak():
    """Stage 0 of two, in PipeDream: two versions, two in flight."""
    cost = StageCost(
        1,
        1,
        param_bytes=1,
        optimizer_bytes=10,
        gradient_bytes=100,
        stash_bytes=1000,
        pass_bytes=10_000,
    )
    assert peak_bytes(pipedream(2), [cost] * 2, STASH) == (12_112, 11_111)


def test_what_waits_for_a_weight_part():
    """zero_bubble_h1 has, on the last of three workers, three microbatches between F and W."""
    cost = replace(EQUAL, stash_bytes=10, held_bytes=1)
    schedule = zero_bubble_h1(3, 6)
    assert peak_bytes(schedule, [cost] * 3) == (30, 21, 12)
    last = [held for held in simulate(schedule, [cost] * 3).memory if held.worker == 2]
    assert [held.stash_bytes for held in last[:6]] == [0, 10, 1, 11, 2, 12]
    assert last[-1].stash_bytes == 0


def test_evaluation_keeps_nothing():
    costs = [replace(EQUAL, stash_bytes=5, param_bytes=3)] * 2
    assert peak_bytes(forward_only(2, 4), costs) == (3, 3)
    assert simulate(forward_only(2, 4), costs).makespan_s == 5


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
    order, count = draw(st.sampled_from([(one_f_one_b, m), (pipedream, 1)]))
    return order(n, count, replicas=replicas, slack=draw(st.integers(0, 1)))


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


# ---------------------------------------------------------------- the timeline


def test_the_timeline_of_a_simulation():
    costs = chain(3, param_bytes=2, stash_bytes=1)
    timeline = simulate(one_f_one_b(3, 4), costs, Topology.uniform(3, 1.0))
    assert timeline.title == "one_f_one_b, simulated"
    assert simulate(gpipe(1, 1), [EQUAL], title="one").title == "one"
    for entries in (timeline.spans, timeline.transfers):
        starts = [entry.start_s for entry in entries]
        assert starts == sorted(starts)
    assert [h.time_s for h in timeline.memory] == sorted(h.time_s for h in timeline.memory)
    assert [tuple(h) for h in timeline.memory[:3]] == [(w, 0, 0, 2) for w in range(3)]
    assert Timeline.from_json(timeline.to_json()) == timeline
    kinds = {type(value) for span in timeline.spans for value in span}
    assert kinds == {int, str, float}
    last = max(span.end_s for span in timeline.spans)
    assert timeline.makespan_s == last
    assert [s.kind for s in timeline.spans_of(2)].count("U") == 1


def test_a_deadlock_is_told():
    schedule = Schedule.parse("""
        worker 0: 0B0 0F0 0U0
        worker 1: 1F0 1B0 1U0
    """)
    with pytest.raises(ScheduleError, match="0B0 waits for ever"):
        simulate(schedule, [EQUAL] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward_s": -1}, "forward_s is -1"),
        ({"stash_bytes": float("nan")}, "stash_bytes is nan"),
        ({"weight_s": "1"}, "weight_s is '1'"),
        ({"sends": ((1, -1),)}, "sends has"),
        ({"returns": ((-1, 1),)}, "returns has"),
        ({"sends": ((1, 1), (1, 2))}, "each stage once"),
    ],
)
def test_costs_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        replace(EQUAL, **change)


@pytest.mark.parametrize(
    ("costs", "options", "message"),
    [
        ([EQUAL], {}, "costs of 1 stages for a schedule of 2"),
        ([EQUAL, replace(EQUAL, sends=((0, 1),))], {}, "expected a later stage"),
        ([replace(EQUAL, sends=((2, 1),)), EQUAL], {}, "expected a later stage"),
        ([replace(EQUAL, returns=((1, 1),)), EQUAL], {}, "expected an earlier one"),
        ([EQUAL] * 2, {"workers": (0, 0)}, "a different number for each"),
        ([EQUAL] * 2, {"workers": (0, 1, 2)}, "a different number for each"),
        ([EQUAL] * 2, {"topology": Topology.uniform(1, 1.0)}, "has 1. Use a larger topology"),
    ],
)
def test_what_does_not_fit_the_schedule_is_refused(costs, options, message):
    with pytest.raises(ValueError, match=message):
        simulate(gpipe(2, 2), costs, **options)


def test_larger_microbatches():
    cost = StageCost(1, 2, None, 3, 4, 5, 6, 7, 8, 9, 10, ((1, 11),), ((0, 12),))
    assert cost.scaled(1) is cost
    assert cost.scaled(2) == StageCost(
        2, 4, None, 6, 4, 5, 6, 7, 16, 18, 20, ((1, 22),), ((0, 24),)
    )
