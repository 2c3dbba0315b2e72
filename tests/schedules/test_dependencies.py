"""The table of kinds, the dependency rule that reads it, and the walks that follow the rule."""

from __future__ import annotations

import numpy as np
import pytest

from pdjax import schedules
from pdjax.schedules import ALGORITHMS, Action, Schedule
from pdjax.schedules.action import BACKWARD, FORWARD, KINDS, inputs_of, makers_of
from pdjax.schedules.columns import Columns
from pdjax.schedules.dependencies import StagePairs, find_needs, needs_in_cycle
from pdjax.schedules.dispatch import dispatch_phases
from pdjax.schedules.text import Grid
from pdjax.schedules.walk import slots_of
from pdjax.simulate import StageCost
from pdjax.timeline.style import NAMES, STYLES

SCHEDULES = [
    *(
        row.make(workers * row.num_chunks, 5 if row.divides else 1)
        for row in ALGORITHMS.values()
        for workers in (1, 2, 4)
    ),
    schedules.pipedream(3, replicas=(2, 3, 1)),
    schedules.pipedream(2, replicas=(2, 1), slack=1, update_lag=1),
    schedules.one_f_one_b(2, 5, replicas=(2, 1)),
]
REPLICATED = [schedule for schedule in SCHEDULES if max(schedule.replicas) > 1]


# ---------------------------------------------------------------- the table


def test_every_need_is_made_by_some_kind():
    assert all(makers_of(need.result) for row in KINDS.values() for need in row.needs)


def test_a_microbatch_leaves_nothing_behind():
    """Whichever way it goes back, its stash and its pending weight gradients are gone."""
    for form in BACKWARD:
        rows = [KINDS[kind] for kind in (FORWARD, *form)]
        assert sum(row.stash for row in rows) == sum(row.pending for row in rows) == 0
        made = sorted(result for row in rows for result in row.makes if result != "pending")
        assert made == ["activations", "cotangents", "gradients"]


def test_every_kind_has_a_style_and_a_cost():
    assert set(STYLES) >= set(KINDS)
    assert NAMES["FBU"] == "forward, backward and update"
    assert StageCost(1, 2, 3, 4, 5).seconds == (1, 2, 3, 4, 5)


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
def test_the_needs_are_the_inputs_of_each_action(schedule):
    columns = schedule.unrolled(2 * schedule.num_minibatches)
    actions = [Action(*row) for worker in columns.rows() for row in worker]
    found: dict[int, list[Action]] = {}
    for at, need in find_needs(columns).tuples():
        assert need >= 0
        found.setdefault(at, []).append(actions[need])
    for at, action in enumerate(actions):
        inputs = [] if action.kind == "U" else inputs_of(action, schedule.num_stages)
        # an input part is what is needed of a backward pass in two parts
        needs = [
            each._replace(kind="B") if each.kind == "I" and action.kind != "W" else each
            for each in found.get(at, [])
        ]
        assert needs == inputs


def test_stages_that_are_skipped():
    """Stage 2 waits for stages 0 and 1, and stage 0 for the cotangents of both others."""
    rows = [[("F", s, 0), ("B", s, 0)] for s in range(3)]
    columns = Columns.of(rows)
    pairs = StagePairs(np.array([1, 2, 0, 2, 0, 1]), np.array([0, 0, 1, 1, 2, 2]))
    names = [f"{s}{kind}" for s in range(3) for kind in "FB"]
    needs = {(names[action], names[need]) for action, need in find_needs(columns, pairs).tuples()}
    assert needs == {
        ("1F", "0F"),
        ("2F", "0F"),
        ("2F", "1F"),
        ("0B", "0F"),
        ("0B", "1B"),
        ("0B", "2B"),
        ("1B", "1F"),
        ("1B", "2B"),
        ("2B", "2F"),
    }


def test_a_result_of_an_earlier_cycle_is_no_need():
    """PipeDream, three stages: only the last one needs its own result of the same cycle."""
    schedule = schedules.pipedream(3)
    actions = schedule.actions
    needs = needs_in_cycle(schedule.columns, schedule.cycle)
    found = {(str(actions[action]), str(actions[need])) for action, need in needs.tuples()}
    assert found == {("1F0", "0F0"), ("2F0", "1F0"), ("2B0", "2F0")}


# ---------------------------------------------------------------- walks


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
def test_slots_are_the_earliest(schedule):
    """A worker's slot is one behind its last one, or behind the last one that it waits for."""
    columns = schedule.unrolled(3)
    slots = slots_of(columns)
    earliest = np.zeros(len(columns), int)
    for action, need in find_needs(columns).tuples():
        if need >= 0:
            earliest[action] = max(earliest[action], slots[need] + 1)
    for at, slot in enumerate(slots):
        first = at == 0 or columns.worker[at - 1] != columns.worker[at]
        assert slot == max(earliest[at], 0 if first else slots[at - 1] + 1)


def dispatch_slowly(schedule: Schedule, num_steps: int) -> list[list[tuple[int, Action]]]:
    """Sweeps over the workers, each of which does its next action if it can."""
    lists = [list(worker) for worker in schedule.unroll(num_steps)]
    done: set[Action] = set()
    gradients: set[tuple[int, int]] = set()

    def ready(action: Action) -> bool:
        if action.kind != "U":
            return done.issuperset(inputs_of(action, schedule.num_stages))
        size = schedule.per_update[action.stage]
        first = action.microbatch // size * size
        return all((action.stage, k) in gradients for k in range(first, action.microbatch + 1))

    steps = []
    for step in range(num_steps):
        given, steps = (step + 1) * schedule.num_microbatches, [*steps, []]
        before = -1
        while before < len(steps[-1]):
            before = len(steps[-1])
            for number, actions in enumerate(lists):
                if actions and actions[0].microbatch < given and ready(actions[0]):
                    action = actions.pop(0)
                    steps[-1].append((number, action))
                    done.add(action)
                    if action.kind in ("B", "W"):
                        gradients.add((action.stage, action.microbatch))
    assert not any(lists)
    return steps


@pytest.mark.parametrize("schedule", REPLICATED, ids=lambda schedule: str(schedule.replicas))
def test_phases_dispatch_all_that_can_be(schedule):
    count = schedule.num_minibatches
    steps = dispatch_slowly(schedule, (2 * schedule.lag + 3) * count)
    first = (schedule.lag + 1) * count
    for phase, step in zip(dispatch_phases(schedule), range(first, first + count), strict=True):
        shift = -step * schedule.num_microbatches
        expected = [(worker, action.shifted(shift)) for worker, action in steps[step]]
        assert [tuple(turn) for turn in phase] == expected


def test_a_grid_has_the_arguments_of_a_schedule():
    schedule = schedules.gpipe(2, 3)
    assert vars(Grid.parse(str(schedule))) == {
        "name": "gpipe",
        "num_stages": 2,
        "num_microbatches": 3,
        "workers": schedule.workers,
        "num_minibatches": 1,
    }
