"""Schedules are values: drawn, validated, counted."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdjax import schedules
from pdjax.schedules import ALGORITHMS, Action, Schedule, ScheduleError, dispatch_order, validate
from pdjax.schedules.schedule import draw, inputs_of
from pdjax.weights import (
    LATEST,
    STASH,
    peak_in_flight,
    peak_versions,
    versions_read,
)

SIZES = [(n, m) for n in range(1, 6) for m in (1, 2, 3, 4, 7, 9)]
SYNCHRONOUS = [name for name, row in ALGORITHMS.items() if row.weight_rule == LATEST]


def make(name: str, num_stages: int, num_microbatches: int) -> Schedule:
    return ALGORITHMS[name].order(num_stages, num_microbatches)


@pytest.mark.parametrize(
    ("name", "num_stages", "num_microbatches", "num_steps"),
    [
        ("model_parallel", 3, 2, 1),
        ("gpipe", 3, 3, 1),
        ("one_f_one_b", 3, 4, 1),
        ("pipedream", 3, 1, 4),
    ],
)
def test_the_drawing_in_the_docstring_is_the_schedule(
    name, num_stages, num_microbatches, num_steps
):
    lines = re.findall(r"^\s*(worker \d: .*)$", getattr(schedules, name).__doc__, re.MULTILINE)
    drawing = draw(make(name, num_stages, num_microbatches).unroll(num_steps))
    assert drawing == "\n".join(lines)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_synchronous_schedules_are_valid(name, num_stages, num_microbatches):
    schedule = make(name, num_stages, num_microbatches)
    validate(schedule, LATEST)
    assert schedule.flushes
    assert all(worker[-1].kind == "U" for worker in schedule.workers)


@pytest.mark.parametrize("num_stages", range(1, 7))
def test_pipedream_is_valid_with_a_stash_only(num_stages):
    schedule = make("pipedream", num_stages, 1)
    validate(schedule, STASH)
    if num_stages > 1:
        with pytest.raises(ScheduleError, match="would read version 1"):
            validate(schedule, LATEST)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_peak_in_flight(num_stages, num_microbatches):
    for stage in range(num_stages):
        expected = {
            "model_parallel": 1,
            "gpipe": num_microbatches,
            "one_f_one_b": min(num_stages - stage, num_microbatches),
        }
        for name, peak in expected.items():
            worker = make(name, num_stages, num_microbatches).workers[stage]
            assert peak_in_flight(worker, stage) == peak
            assert peak_versions(worker, stage, LATEST) == 1


@pytest.mark.parametrize("num_stages", range(1, 7))
def test_pipedream_keeps_a_version_for_each_microbatch_in_flight(num_stages):
    workers = make("pipedream", num_stages, 1).unroll(2 * num_stages)
    for stage, worker in enumerate(workers):
        assert peak_in_flight(worker, stage) == num_stages - stage
        assert peak_versions(worker, stage, STASH) == num_stages - stage
        reads = list(versions_read(worker, STASH))
        warm_up = num_stages - 1 - stage
        assert [read.forward for read in reads] == [max(0, b - warm_up) for b in range(len(reads))]
        assert max(read.staleness for read in reads) == warm_up


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
def test_time_with_backward_twice_as_long(name, num_stages, num_microbatches):
    """GPipe and 1F1B both take 3 (n + m - 1) units where F takes one and B two."""
    schedule = make(name, num_stages, num_microbatches)
    ends: dict[Action, int] = {}
    position, free = [0] * num_stages, [0] * num_stages
    while any(position[w] < len(schedule.workers[w]) for w in range(num_stages)):
        for worker, actions in enumerate(schedule.workers):
            while position[worker] < len(actions):
                action = actions[position[worker]]
                needs = [need for need in inputs_of(action, num_stages) if action.kind != "U"]
                if any(need not in ends for need in needs):
                    break
                start = max([free[worker], *(ends[need] for need in needs)])
                ends[action] = start + {"F": 1, "B": 2, "U": 0}[action.kind]
                free[worker] = ends[action]
                position[worker] += 1
    assert max(ends.values()) == 3 * (num_stages + num_microbatches - 1)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_dispatch_keeps_the_workers_order_and_needs_nothing_of_the_future(name, num_stages):
    num_microbatches = 1 if name == "pipedream" else 5
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
                needs = set(inputs_of(absolute, num_stages))
                assert needs <= done
                done.add(absolute)


def broken(change) -> Schedule:
    """1F1B for 3 stages and 4 microbatches with the list of worker 1 changed."""
    good = make("one_f_one_b", 3, 4)
    workers = [list(worker) for worker in good.workers]
    change(workers)
    return Schedule("broken", 3, 4, tuple(map(tuple, workers)))


def _delete(w):
    del w[1][2]


def _repeat(w):
    w[1].insert(3, w[1][2])


def _backward_first(w):
    at = w[1].index(Action("B", 1, 2))
    w[1].insert(w[1].index(Action("F", 1, 2)), w[1].pop(at))


def _update_early(w):
    w[1].insert(0, w[1].pop())


def _no_update(w):
    w[1].pop()


def _circle(w):
    """Stage 0 does not bring microbatch 1 before it is done with 0, stage 1 waits for both."""
    passes = [Action(kind, 0, k) for k in range(4) for kind in ("F", "B")]
    w[0][:] = [*passes, w[0][-1]]


def _stage_on_two_workers(w):
    w[2].append(w[1].pop(0))


def _update_in_between(w):
    w[1].insert(5, Action("U", 1, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_delete, "1F1 is missing|1B0 is missing"),
        (_repeat, "is repeated"),
        (_backward_first, "1B2 comes before 1F2"),
        (_update_early, "1U3 comes before its gradient"),
        (_no_update, "no update applies the gradient of 1B0"),
        (_circle, "waits for ever"),
        (_stage_on_two_workers, "stage 1 is on 2 workers"),
        (_update_in_between, "expected one update for each minibatch, of all its 4 microbatches"),
    ],
)
def test_what_cannot_be_run_is_refused(change, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        validate(broken(change), LATEST)
    assert "worker 0:" in str(caught.value)


def test_stale_weights_need_a_rule_that_stashes_them():
    validate(make("pipedream", 3, 1), STASH)
    with pytest.raises(ScheduleError, match="would read version"):
        validate(make("pipedream", 3, 1), LATEST)


def test_an_update_for_every_microbatch_is_refused():
    actions = [Action(kind, 0, k) for k in range(2) for kind in ("F", "B", "U")]
    with pytest.raises(ScheduleError, match=r"0U0 applies the gradients of the microbatches \[0\]"):
        validate(Schedule("eager", 1, 2, (tuple(actions),)), LATEST)


def test_the_failing_action_is_marked():
    with pytest.raises(ScheduleError, match=">1B2<"):
        validate(broken(_backward_first), LATEST)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Action("X", 0, 0), "expected a kind"),  # pyright: ignore[reportArgumentType]
        (Action("F", 5, 0), "stage 5; expected 0 to 1"),
        (Action("F", 0, 2), "microbatch 2"),
        (Action("F", 0, -1), "microbatch -1"),
    ],
)
def test_actions_out_of_range_are_refused_when_made(action, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule("bad", 2, 2, ((action,), ()))


def test_a_backward_that_a_later_step_would_feed_is_refused():
    """Stage 0 may not go back to a microbatch sooner than stage 1 does."""
    workers = (
        (Action("F", 0, 0), Action("B", 0, 0), Action("U", 0, 0)),
        (Action("F", 1, 0), Action("B", 1, -1), Action("U", 1, -1)),
    )
    with pytest.raises(ScheduleError, match="waits for ever"):
        validate(Schedule("too soon", 2, 1, workers), STASH)


def test_pipedream_takes_one_microbatch():
    with pytest.raises(ValueError, match="num_microbatches=4"):
        schedules.pipedream(2, 4)


def test_unknown_algorithm_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'gpipe'"):
        schedules.find_algorithm("gpip")


def test_json():
    value = json.loads(schedules.gpipe(2, 1).to_json())
    assert value["workers"] == [["0F0", "0B0", "0U0"], ["1F0", "1B0", "1U0"]]


@given(
    st.sampled_from(SYNCHRONOUS),
    st.integers(1, 6),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_a_deleted_or_repeated_action_never_passes(name, num_stages, num_microbatches, random):
    schedule = make(name, num_stages, num_microbatches)
    workers = [list(worker) for worker in schedule.workers]
    worker = random.randrange(num_stages)
    at = random.randrange(len(workers[worker]))
    if random.random() < 0.5:
        del workers[worker][at]
    else:
        workers[worker].insert(random.randrange(len(workers[worker]) + 1), workers[worker][at])
    changed = tuple(map(tuple, workers))
    with pytest.raises(ScheduleError):
        validate(Schedule(name, num_stages, num_microbatches, changed), LATEST)
