"""The simulator: closed forms hold exactly."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from slow_simulator import chain, versions_alive

from pdjax.schedules import (
    ALGORITHMS,
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
from pdjax.schedules.versions import delay_of, version_changes
from pdjax.schedules.weight_rule import DOUBLE_BUFFER, LATEST, STASH, VERTICAL_SYNC
from pdjax.simulate import StageCost, peak_bytes, simulate, staleness, steady_s
from pdjax.timeline.timeline import Timeline
from pdjax.topology.topology import Topology

SIZES = [(n, m) for n in (1, 2, 3, 5) for m in (1, 2, 3, 4, 8, 12)]
EQUAL = StageCost(forward_s=1, backward_s=2)


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


@pytest.mark.parametrize(
    ("rows", "action"),
    [
        ("worker 0: 0B0 0F0 0U0\nworker 1: 1F0 1B0 1U0", "0B0"),
        ("worker 0: 0F0 0B0 0U0\nworker 1: 1B0 1F0 1U0", "0B0"),
        ("worker 0: 0F0 0W0 0I0", "0W0"),
        ("worker 0: 0F0 0U0\nworker 1: 0B0 0U0", "0U0"),
    ],
)
def test_a_deadlock_is_told(rows, action):
    schedule = Schedule.parse(rows)
    with pytest.raises(ScheduleError, match=f"{action} waits for ever.*\n(.|\n)*>{action}<"):
        simulate(schedule, [EQUAL] * schedule.num_stages)


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


@pytest.mark.parametrize("targets", [(1, 2), (2, 1)])
def test_a_stage_sends_in_the_order_of_its_pairs(targets):
    """Over its only link, one transfer after the other."""
    costs = [
        StageCost(1, 2, sends=tuple((target, 4) for target in targets)),
        StageCost(1, 2, sends=((2, 4),)),
        StageCost(1, 2),
    ]
    timeline = simulate(gpipe(3, 1), costs, Topology.parse("3@0.000000004GB/s"))
    sent = [(t.target, t.start_s, t.end_s) for t in timeline.transfers if t.source == 0]
    assert sent == [(targets[0], 1, 2), (targets[1], 2, 3)]
