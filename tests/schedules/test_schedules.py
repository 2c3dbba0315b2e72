"""Schedules are values: drawn, validated, counted."""

from __future__ import annotations

import itertools
import json
import re
from itertools import accumulate

import numpy as np
import pytest

from pdjax import schedules
from pdjax.schedules import ALGORITHMS, Action, Schedule, ScheduleError, dispatch_order, validate
from pdjax.schedules.action import inputs_of
from pdjax.schedules.text import draw
from pdjax.schedules.versions import delay_of, peak_in_flight, peak_versions, versions_read
from pdjax.schedules.weight_rule import DOUBLE_BUFFER, LATEST, STASH, VERTICAL_SYNC

SIZES = [(n, m) for n in range(1, 6) for m in (1, 2, 3, 4, 7, 9)]
SYNCHRONOUS = [name for name, row in ALGORITHMS.items() if not row.stale]


def make(name: str, num_workers: int, num_microbatches: int, chunks: int | None = None) -> Schedule:
    algorithm = ALGORITHMS[name]
    num_stages = num_workers * (chunks or algorithm.num_chunks)
    return algorithm.make(num_stages, num_microbatches, chunks)


def is_defined(name: str, num_workers: int, num_microbatches: int) -> bool:
    if name == "pipedream_2bw":
        return num_microbatches >= num_workers
    return ALGORITHMS[name].divides or num_microbatches == 1


@pytest.mark.parametrize(
    ("name", "num_workers", "num_microbatches", "num_steps"),
    [
        ("model_parallel", 3, 2, 1),
        ("gpipe", 3, 3, 1),
        ("one_f_one_b", 3, 4, 1),
        ("interleaved", 2, 3, 1),
        ("zero_bubble_h1", 3, 4, 1),
        ("zero_bubble_v", 2, 2, 1),
        ("pipedream", 3, 1, 4),
        ("pipedream_2bw", 2, 2, 3),
        ("forward_only", 3, 4, 0),
    ],
)
def test_the_drawing_in_the_docstring_is_the_schedule(
    name, num_workers, num_microbatches, num_steps
):
    function = getattr(schedules, name)
    lines = re.findall(r"^\s*(worker \d: .*)$", function.__doc__, re.MULTILINE)
    if name == "forward_only":
        assert draw(function(num_workers, num_microbatches).workers) == "\n".join(lines)
        return
    drawing = draw(make(name, num_workers, num_microbatches).unroll(num_steps))
    assert drawing == "\n".join(lines)


@pytest.mark.parametrize("num_workers", range(1, 9))
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_schedule_is_valid(name, num_workers):
    """For all stages up to 8, microbatches up to 16 and chunks up to 3."""
    algorithm = ALGORITHMS[name]
    for chunks in (1, 2, 3) if name == "interleaved" else (None,):
        for num_microbatches in range(1, 17):
            if is_defined(name, num_workers, num_microbatches):
                schedule = make(name, num_workers, num_microbatches, chunks)
                validate(schedule, algorithm.weight_rule)
                assert schedule.flushes or algorithm.stale


@pytest.mark.parametrize("num_workers", range(2, 7))
def test_stale_schedules_need_their_weight_rule(num_workers):
    pipedream = make("pipedream", num_workers, 1)
    validate(pipedream, STASH)
    validate(pipedream, VERTICAL_SYNC)
    with pytest.raises(ScheduleError, match="would read version 1"):
        validate(pipedream, LATEST)
    two_versions = make("pipedream_2bw", num_workers, num_workers)
    validate(two_versions, STASH)
    with pytest.raises(ScheduleError, match="would read version"):
        validate(two_versions, LATEST)


def test_a_rule_may_not_read_what_is_not_there_yet():
    """With the double buffer PipeDream would have to wait for updates that come later."""
    with pytest.raises(ScheduleError, match=r"would read version 1 .* before an update makes it"):
        validate(make("pipedream", 3, 1), DOUBLE_BUFFER)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_peak_in_flight(num_stages, num_microbatches):
    for stage in range(num_stages):
        expected = {
            "model_parallel": 1,
            "gpipe": num_microbatches,
            "one_f_one_b": min(num_stages - stage, num_microbatches),
            "zero_bubble_h1": min(num_stages - stage, num_microbatches),
        }
        for name, peak in expected.items():
            worker = make(name, num_stages, num_microbatches).workers[stage]
            assert peak_in_flight(worker, stage) == peak
            assert peak_versions(worker, stage, LATEST) == 1


@pytest.mark.parametrize("num_workers", range(1, 7))
def test_zero_bubble_keeps_the_memory_of_1f1b(num_workers):
    """Between F and W at most n microbatches on a worker: those that stage 0 has under 1F1B.

    With two stages on each worker that is n minibatches' worth of both.
    """
    for name, most in (("zero_bubble_h1", num_workers), ("zero_bubble_v", 2 * num_workers)):
        schedule = make(name, num_workers, 3 * num_workers)
        for worker in schedule.workers:
            steps = [{"F": 1, "B": -1, "W": -1, "I": 0, "U": 0}[a.kind] for a in worker]
            assert max(accumulate(steps)) <= most


@pytest.mark.parametrize("num_workers", range(1, 7))
@pytest.mark.parametrize("name", ["zero_bubble_h1", "zero_bubble_v"])
def test_the_first_stage_never_divides_its_backward_pass(name, num_workers):
    schedule = make(name, num_workers, 5)
    kinds = [{a.kind for a in schedule.actions if a.stage == s} for s in range(schedule.num_stages)]
    assert kinds[0] == {"F", "B", "U"}
    assert all(kind == {"F", "I", "W", "U"} for kind in kinds[1:])


@pytest.mark.parametrize("num_stages", range(1, 7))
def test_pipedream_keeps_a_version_for_each_microbatch_in_flight(num_stages):
    schedule = make("pipedream", num_stages, 1)
    workers, columns = schedule.unroll(2 * num_stages), schedule.unrolled(2 * num_stages)
    read = versions_read(columns, STASH)
    for stage, worker in enumerate(workers):
        warm_up = num_stages - 1 - stage
        assert peak_in_flight(worker, stage) == num_stages - stage
        assert peak_versions(worker, stage, STASH) == num_stages - stage
        mine = columns.stage[read.at] == stage
        versions = [max(0, b - warm_up) for b in range(2 * num_stages)]
        assert read.forward[mine].tolist() == versions
        assert read.backward[mine].tolist() == versions
        assert read.staleness[mine].max() == warm_up


@pytest.mark.parametrize("num_stages", range(1, 7))
def test_vertical_sync_reads_one_version_on_all_stages_and_keeps_n(num_stages):
    schedule = make("pipedream", num_stages, 1)
    delay = delay_of(VERTICAL_SYNC, schedule)
    assert delay == num_stages - 1
    columns = schedule.unrolled(3 * num_stages)
    read = versions_read(columns, VERTICAL_SYNC, 1, delay)
    microbatch = columns.microbatch[read.at]
    assert (read.forward == [max(0, b - num_stages + 1) for b in microbatch]).all()
    for stage, worker in enumerate(schedule.unroll(3 * num_stages)):
        assert peak_versions(worker, stage, VERTICAL_SYNC, 1, delay) == num_stages


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 3), (2, 2), (3, 4), (4, 4), (4, 7)])
def test_2bw_reads_the_version_before_and_keeps_two(n, m):
    schedule = make("pipedream_2bw", n, m)
    columns = schedule.unrolled(5)
    read = versions_read(columns, DOUBLE_BUFFER, m, 1)
    expected = [max(0, b // m - 1) for b in columns.microbatch[read.at]]
    assert read.forward.tolist() == read.backward.tolist() == expected
    for stage, worker in enumerate(schedule.unroll(5)):
        assert peak_versions(worker, stage, DOUBLE_BUFFER, m, 1) == 2
        assert peak_in_flight(worker, stage) == n - stage


def test_replicas_are_as_far_ahead_as_the_next_stage_needs():
    assert schedules.warm_ups((1, 1, 1, 1)) == (3, 2, 1, 0)
    assert schedules.warm_ups((3, 1)) == (1, 0)
    assert schedules.warm_ups((1, 3)) == (3, 0)
    assert schedules.warm_ups((2, 3, 1)) == (3, 1, 0)
    assert schedules.warm_ups((1, 1, 1), slack=1) == (4, 2, 0)


def replications(num_workers: int) -> list[tuple[int, ...]]:
    """All ways to share out workers among stages."""
    return [
        (first, *rest)
        for first in range(1, num_workers + 1)
        for rest in (replications(num_workers - first) if first < num_workers else [()])
    ]


@pytest.mark.parametrize("slack", [0, 1])
def test_replicas_take_turns(slack):
    """All 255 patterns with up to 8 workers; both passes use u + max(0, b // r - W)."""
    patterns = [pattern for count in range(1, 9) for pattern in replications(count)]
    assert len(patterns) == 255
    for replicas in patterns:
        schedule = schedules.pipedream(len(replicas), replicas=replicas, slack=slack)
        validate(schedule, STASH)
        assert schedule.replicas == replicas
        ahead = schedules.warm_ups(replicas, slack)
        columns = schedule.unrolled(2 * schedule.num_minibatches + 3)
        read = versions_read(columns, STASH)
        stage, microbatch = columns.stage[read.at], columns.microbatch[read.at]
        turn = np.array(replicas)[stage]
        expected = np.maximum(0, microbatch // turn - np.array(ahead)[stage])
        assert (read.forward == expected).all()
        assert (read.backward == expected).all()


@pytest.mark.parametrize("num_microbatches", [1, 2, 5, 8])
def test_replicas_under_a_synchronous_schedule(num_microbatches):
    for replicas in [pattern for count in range(1, 7) for pattern in replications(count)]:
        schedule = schedules.one_f_one_b(len(replicas), num_microbatches, replicas=replicas)
        validate(schedule, LATEST)


def test_a_drain_applies_what_there_is_of_a_round():
    rows = schedules.pipedream(1, replicas=(2,)).unroll(3)
    assert [" ".join(map(str, row)) for row in rows] == [
        "0F0 0B0 0U1 0F2 0B2 0U2",
        "0F1 0B1 0U1 0U2",
    ]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_dispatch_keeps_the_workers_order_and_needs_nothing_of_the_future(name, num_stages):
    num_microbatches = 5 if ALGORITHMS[name].divides else 1
    schedule = make(name, num_stages, num_microbatches)
    order = dispatch_order(schedule)
    assert sorted(order) == sorted(schedule.actions)
    for worker in schedule.workers:
        assert tuple(action for action in order if action in worker) == worker
    done: set[Action] = set()
    for step in range(num_stages + 3):
        for action in order:
            absolute = action.shifted(step * num_microbatches)
            if absolute.microbatch >= 0:
                assert set(inputs_of(absolute, schedule.num_stages)) <= done
                done.add(absolute)
                if absolute.kind == "I":  # for the stage before it is the backward pass
                    done.add(absolute._replace(kind="B"))
                if absolute.kind == "W":
                    done.add(absolute._replace(kind="B"))


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_dispatch_of_forward_passes_only(num_stages, num_microbatches):
    """Microbatch by microbatch through the stages; a single action among the cases."""
    order = dispatch_order(schedules.forward_only(num_stages, num_microbatches))
    rounds = itertools.product(range(num_microbatches), range(num_stages))
    assert order == tuple(Action("F", stage, microbatch) for microbatch, stage in rounds)


def test_pipedream_takes_one_microbatch():
    with pytest.raises(ValueError, match="num_microbatches=4"):
        schedules.pipedream(2, 4)


def test_unknown_algorithm_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'gpipe'"):
        schedules.find_algorithm("gpip")


@pytest.mark.parametrize(("num_workers", "num_microbatches"), [(1, 1), (2, 3), (3, 4)])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_text_and_json_read_back(name, num_workers, num_microbatches, tmp_path):
    count = num_microbatches if ALGORITHMS[name].divides else 1
    schedule = make(name, num_workers, count)
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule
    schedule.save(tmp_path / "schedule.txt")
    assert Schedule.load(tmp_path / "schedule.txt") == schedule


def test_replicas_read_back():
    schedule = schedules.pipedream(3, replicas=(2, 3, 1))
    assert Schedule.parse(str(schedule)) == schedule
    assert str(schedule).startswith("pipedream: 3 stages, 1 microbatch, cycle of 6 minibatches\n")


def test_a_schedule_written_by_hand():
    schedule = Schedule.parse("""
        # only the order counts
        worker 0: 0F0 0F1  0B0 0B1  0U1
        worker 1: 1F0 1B0 1F1 1B1 1U1
    """)
    assert (schedule.name, schedule.num_stages, schedule.num_microbatches) == ("custom", 2, 2)
    validate(schedule, LATEST)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker 0: 0F0 0X0", "line 1: '0X0' is no action"),
        ("worker 0: 0F0\nworker 2: 1F0", "line 2 is of worker 2; expected worker 1"),
        ("gpipe\nworker 0: 0F0", "line 1 is 'gpipe'; expected a row"),
        ("", "there is no row"),
        ("gpipe: 1 stage, 1 microbatch\nworker 0: 1F0", "names stage 1; expected 0 to 0"),
    ],
)
def test_text_that_is_no_schedule(text, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"'.*none\.txt' cannot be read"):
        Schedule.load(tmp_path / "none.txt")


def test_json_that_is_no_schedule():
    with pytest.raises(ScheduleError, match="no schedule in JSON"):
        Schedule.from_json('{"name": "gpipe"}')


def test_json():
    value = json.loads(schedules.gpipe(2, 1).to_json())
    assert value["workers"] == [["0F0", "0B0", "0U0"], ["1F0", "1B0", "1U0"]]


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: schedules.pipedream_2bw(4, 3), "at least 4 microbatches"),
        (
            lambda: schedules.interleaved(5, 4),
            "which 5 stages do not divide into. Use num_stages=6",
        ),
        (lambda: schedules.interleaved(4, 4, num_chunks=0), "num_chunks=0; expected at least 1"),
        (lambda: schedules.zero_bubble_v(6, 4, num_chunks=3), "num_chunks=3; expected 2"),
        (lambda: schedules.one_f_one_b(2, 2, replicas=(1,)), "is for 1 stages"),
        (lambda: schedules.pipedream(2, replicas=(1, 0)), "expected at least one replica"),
        (lambda: ALGORITHMS["gpipe"].make(4, 4, 2), "runs one stage on each worker"),
    ],
)
def test_schedules_that_there_are_not(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()
