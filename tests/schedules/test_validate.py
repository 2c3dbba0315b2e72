"""What the validator accepts can be run, and what can be run it accepts."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdjax import schedules
from pdjax.schedules import ALGORITHMS, Action, Schedule, ScheduleError, validate
from pdjax.schedules.action import inputs_of
from pdjax.schedules.weight_rule import LATEST, STASH, WeightRule

FAST = settings(deadline=None, max_examples=300)


def broken(change, name="one_f_one_b") -> Schedule:
    """A schedule of 3 stages and 4 microbatches with the list of worker 1 changed."""
    good = ALGORITHMS[name].make(3, 4)
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


def _weight_part_first(w):
    at = w[1].index(Action("W", 1, 2))
    w[1].insert(w[1].index(Action("I", 1, 2)), w[1].pop(at))


def _mixed(w):
    w[1].insert(-1, Action("B", 1, 2))


def _weight_part_only(w):
    w[1].remove(Action("I", 1, 2))


def _update_early(w):
    w[1].insert(0, w[1].pop())


def _update_before_the_weight_part(w):
    w[1][-2:] = w[1][-1], w[1][-2]


def _no_update(w):
    w[1].pop()


def _circle(w):
    """Stage 0 does not bring microbatch 1 before it is done with 0, stage 1 waits for both."""
    passes = [Action(kind, 0, k) for k in range(4) for kind in ("F", "B")]
    w[0][:] = [*passes, w[0][-1]]


def _stage_on_two_workers(w):
    w[2].append(w[1].pop(0))


def _update_on_two_workers(w):
    w[2].append(Action("U", 1, 3))


def _update_in_between(w):
    w[1].insert(5, Action("U", 1, 0))


def _no_stage(w):
    w[1].clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_delete, "1F1 is missing|1B0 is missing"),
        (_repeat, "is repeated"),
        (_backward_first, "1B2 comes before 1F2, which it waits for"),
        (_update_early, "1U3 comes before its gradient, that of 1B0"),
        (_no_update, "no update applies the gradient of 1B3"),
        (_circle, "0B0 waits for 1B0, which comes after 1F1; 1F1 waits for 0F1, which comes"),
        (_stage_on_two_workers, "1F0 is on worker 2 and 1B0 on worker 1; expected all passes"),
        (
            _update_on_two_workers,
            r"1F1 is on worker 1, but the workers \[1, 2\] of stage 1 take its microbatches",
        ),
        (_update_in_between, "1U0 comes before its gradient"),
        (_no_stage, "no worker runs stage 1"),
    ],
)
def test_what_cannot_be_run_is_refused(change, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        validate(broken(change), LATEST)
    assert "worker 0:" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_weight_part_first, "1W2 comes before 1I2, which it waits for"),
        (_mixed, "1B2 is mixed with I or W of the same microbatch"),
        (_weight_part_only, "1I2 is missing"),
        (_update_before_the_weight_part, "1U3 comes before its gradient, that of 1W3"),
    ],
)
def test_divided_backward_passes_that_cannot_be_run(change, message):
    with pytest.raises(ScheduleError, match=message):
        validate(broken(change, "zero_bubble_h1"), LATEST)


def test_a_grid_that_cannot_be_run_reads_back():
    stuck = broken(_circle)
    assert "|" in str(stuck)
    assert Schedule.parse(str(stuck)) == stuck


def test_an_update_for_every_microbatch_is_refused():
    actions = [Action(kind, 0, k) for k in range(2) for kind in ("F", "B", "U")]
    with pytest.raises(ScheduleError, match="0U0 comes before its gradient, that of 0B1"):
        validate(Schedule("eager", 1, 2, (tuple(actions),)), LATEST)


def test_the_failing_action_is_marked():
    with pytest.raises(ScheduleError, match=">1B2<"):
        validate(broken(_backward_first), LATEST)


def test_of_a_large_grid_what_is_around_the_fault_is_shown():
    good = schedules.one_f_one_b(40, 200)
    workers = [list(worker) for worker in good.workers]
    workers[30].remove(Action("B", 30, 100))
    workers[30].insert(0, Action("B", 30, 100))
    with pytest.raises(ScheduleError, match=">30B100<") as caught:
        validate(Schedule("broken", 40, 200, tuple(map(tuple, workers))), LATEST)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 24
    assert max(map(len, lines)) < 400


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
    with pytest.raises(ScheduleError, match="0B0 waits for a result that no earlier cycle makes"):
        validate(Schedule("too soon", 2, 1, workers), STASH)


# ---------------------------------------------------------------- any single mutation


def _cases() -> list[tuple[Schedule, WeightRule]]:
    found = []
    for algorithm in ALGORITHMS.values():
        for num_workers, count in ((1, 3), (2, 1), (2, 4), (3, 5), (4, 4)):
            m = count if algorithm.divides else 1
            if algorithm.order is schedules.pipedream_2bw and m < num_workers:
                continue
            schedule = algorithm.make(num_workers * algorithm.num_chunks, m)
            found.append((schedule, algorithm.weight_rule))
    found.append((schedules.pipedream(3, replicas=(2, 3, 1)), STASH))
    found.append((schedules.pipedream(2, replicas=(2, 1), update_lag=1), STASH))
    found.append((schedules.one_f_one_b(2, 5, replicas=(2, 1)), LATEST))
    return found


CASES = _cases()


def depends(schedule: Schedule, later: Action, earlier: Action) -> bool:
    """Whether, of two actions of a worker in a cycle, `later` needs `earlier`, if indirectly."""
    pending, seen = [later], set()
    divided = {(a.stage, a.microbatch) for a in schedule.actions if a.kind == "I"}
    while pending:
        action = pending.pop()
        if action == earlier:
            return True
        if action in seen:
            continue
        seen.add(action)
        if action.kind == "U":
            worker = next(w for w in schedule.workers if action in w and later in w)
            pending += [
                a
                for a in worker[: worker.index(action)]
                if a.stage == action.stage
                and a.kind in ("B", "W")
                and a.microbatch <= action.microbatch  # a late update leaves out the newest
            ]
            continue
        for need in inputs_of(action, schedule.num_stages):
            halved = need.kind == "B" and (need.stage, need.microbatch) in divided
            pending.append(need._replace(kind="I") if halved else need)
    return False


@FAST
@given(st.sampled_from(CASES), st.randoms(use_true_random=False))
def test_any_single_mutation_is_refused(case, random):
    schedule, rule = case
    workers = [list(worker) for worker in schedule.workers]
    number = random.randrange(len(workers))
    worker = workers[number]
    at = random.randrange(len(worker))
    mutation = random.choice(["delete", "repeat", "move", "swap"])
    if mutation == "delete":
        del worker[at]
    elif mutation == "repeat":
        worker.insert(random.randrange(len(worker) + 1), worker[at])
    elif mutation == "move":
        others = [other for other in range(len(workers)) if other != number]
        if not others:
            return
        target = workers[random.choice(others)]
        target.insert(random.randrange(len(target) + 1), worker.pop(at))
    else:
        pairs = [
            (i, j)
            for j in range(len(worker))
            for i in range(j)
            if depends(schedule, worker[j], worker[i])
        ]
        if not pairs:
            return
        i, j = random.choice(pairs)
        worker[i], worker[j] = worker[j], worker[i]
    changed = tuple(map(tuple, workers))
    with pytest.raises(ScheduleError):
        validate(
            Schedule(
                "mutated",
                schedule.num_stages,
                schedule.num_microbatches,
                changed,
                schedule.num_minibatches,
            ),
            rule,
        )


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("replicas", [(2, 3, 1), (3, 2)])
def test_an_update_that_a_replica_lacks_is_refused(replicas, lag):
    """Whether it is gone or on another worker, which has no gradients for it."""
    good = schedules.pipedream(len(replicas), replicas=replicas, update_lag=lag)
    for number, worker in enumerate(good.workers):
        for at in (at for at, action in enumerate(worker) if action.kind == "U"):
            for target in range(len(good.workers)):
                workers = [list(w) for w in good.workers]
                update = workers[number].pop(at)
                if target != number:
                    workers[target].append(update)
                with pytest.raises(ScheduleError):
                    validate(dataclasses.replace(good, workers=tuple(map(tuple, workers))), STASH)


def can_be_run(schedule: Schedule) -> bool:
    """Does it, action by action: for a synchronous schedule of the right actions in any order."""
    todo = [list(worker) for worker in schedule.workers]
    done: set[Action] = set()
    gradients: Counter[int] = Counter()
    moved = True
    while moved:
        moved = False
        for worker in todo:
            if not worker:
                continue
            action = worker[0]
            if action.kind == "U":
                ready = gradients[action.stage] == schedule.num_microbatches
            else:
                ready = done.issuperset(inputs_of(action, schedule.num_stages))
            if ready:
                worker.pop(0)
                done.add(action)
                if action.kind in ("I", "W"):  # either is what somebody waits for
                    done.add(action._replace(kind="B"))
                gradients[action.stage] += action.kind in ("B", "W")
                moved = True
    return not any(todo)


@FAST
@given(
    st.sampled_from([name for name, row in ALGORITHMS.items() if not row.stale]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_it_accepts_what_can_be_run_and_nothing_else(name, num_workers, num_microbatches, random):
    algorithm = ALGORITHMS[name]
    schedule = algorithm.make(num_workers * algorithm.num_chunks, num_microbatches)
    workers = [list(worker) for worker in schedule.workers]
    for _ in range(random.randrange(4)):  # a few swaps of neighbours: about half can still be run
        worker = random.choice(workers)
        at = random.randrange(len(worker) - 1)
        worker[at], worker[at + 1] = worker[at + 1], worker[at]
    size = schedule.num_stages, schedule.num_microbatches
    shuffled = Schedule("shuffled", *size, tuple(map(tuple, workers)))
    if can_be_run(shuffled):
        validate(shuffled, LATEST)
        return
    with pytest.raises(ScheduleError, match=r">\d+[FBIWU]-?\d+<"):
        validate(shuffled, LATEST)
