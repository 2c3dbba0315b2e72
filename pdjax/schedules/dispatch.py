"""In which order one thread can dispatch the actions of a schedule.

Where the replicas of a stage take turns, a cycle brings several minibatches, one after the other,
and an update waits for the gradients of all replicas; `dispatch_phases` says what can be dispatched
with each of them. Nothing here imports JAX.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pdjax.schedules.action import KINDS, Action, ScheduleError
from pdjax.schedules.dependencies import Needs, find_needs, find_round_needs, needs_in_cycle
from pdjax.schedules.schedule import Schedule
from pdjax.schedules.text import failure
from pdjax.schedules.walk import Walk


def dispatch_order(schedule: Schedule) -> tuple[Action, ...]:
    """The actions of one cycle in an order in which a single thread can dispatch them.

    It keeps the order of every worker's list, and no action comes before one whose result it
    needs. Taken cycle after cycle it is also the order in which the executor drains.

    Raises:
        ScheduleError: if an action needs a result of a later cycle, or actions wait in a circle.
    """
    needs = needs_in_cycle(schedule.columns, schedule.cycle)
    walk = Walk.of(schedule.columns, needs)
    order = walk.in_rounds()
    _check_done(schedule, needs, walk)
    return tuple(map(schedule.actions.__getitem__, order))


def check_order(schedule: Schedule) -> None:
    """Raises what `dispatch_order` would raise; in half the time, as it makes no order."""
    needs = needs_in_cycle(schedule.columns, schedule.cycle)
    walk = Walk.of(schedule.columns, needs)
    walk.in_any_order()
    _check_done(schedule, needs, walk)


class Turn(NamedTuple):
    """One thing to dispatch.

    Attributes:
        worker: the worker that does it.
        action: the action; its microbatch counts from the first one of the minibatch.
    """

    worker: int
    action: Action


def dispatch_phases(schedule: Schedule) -> tuple[tuple[Turn, ...], ...]:
    """For each minibatch of a cycle the actions to dispatch once it is handed over, in order.

    These are all actions that can be dispatched then, once the schedule is under way. While it
    fills and drains, the same order holds for the actions that there are.

    Raises:
        ScheduleError: if a worker never can do its next action.
    """
    if max(schedule.replicas) == 1:
        order = dispatch_order(schedule)
        return (tuple(Turn(schedule.worker_of(a.stage), a) for a in order),)
    cycles = 2 * schedule.lag + 3
    steps = _dispatch_steps(schedule, cycles * schedule.num_minibatches)
    first = (schedule.lag + 1) * schedule.num_minibatches  # of a cycle under way
    return tuple(
        tuple(
            Turn(worker, action.shifted(-step * schedule.num_microbatches))
            for worker, action in steps[step]
        )
        for step in range(first, first + schedule.num_minibatches)
    )


def reach(schedule: Schedule) -> int:
    """How many minibatches after the last one its actions may have to be waited for."""
    behind = 0
    for phase in dispatch_phases(schedule):
        for _, (kind, stage, microbatch) in phase:
            more = schedule.per_update[stage] - 1 if "weights" in KINDS[kind].makes else 0
            behind = max(behind, more - microbatch)
    return -(-behind // schedule.num_microbatches)


def _dispatch_steps(schedule: Schedule, num_steps: int) -> list[list[Turn]]:
    """For each minibatch the actions that are dispatched, of a schedule that is written out.

    The drain comes with the last one.
    """
    columns = schedule.unrolled(num_steps)
    needs = [find_needs(columns), find_round_needs(columns, schedule.holders)]
    walk = Walk.of(columns, Needs.concatenate(needs))
    lists = [tuple(map(Action._make, row)) for row in columns.rows()]
    actions = [action for row in lists for action in row]
    # Each action waits for its minibatch, too.
    walk.missing = [count + 1 for count in walk.missing]
    by_step = np.argsort(columns.microbatch, kind="stable")
    bounds = np.arange(num_steps + 1) * schedule.num_microbatches
    bounds = np.searchsorted(columns.microbatch[by_step], bounds).tolist()
    steps = []
    for step in range(num_steps):
        for action in by_step[bounds[step] : bounds[step + 1]].tolist():
            walk.missing[action] -= 1
        order = walk.in_rounds()
        steps.append([Turn(walk.worker[at], actions[at]) for at in order])
    for head in walk.stuck():
        number = walk.worker[head]
        raise failure(f"{actions[head]} on worker {number} waits for ever", lists, actions[head])
    return steps


def _check_done(schedule: Schedule, needs: Needs, walk: Walk) -> None:
    """Raises ScheduleError if a worker has actions left after a walk."""
    heads = walk.stuck()
    if not heads:
        return
    done = np.ones(len(walk.worker) + 1, bool)
    done[-1] = False  # position -1 stands for a result that no earlier cycle makes
    for head, stop in zip(walk.heads, walk.stops, strict=True):
        done[head:stop] = False
    open_ = needs.take(~done[needs.need])
    missing: dict[int, int] = {}
    for action, need in open_.take(np.isin(open_.action, heads)).tuples():
        missing.setdefault(action, need)
    raise _stuck(schedule, missing)


def _stuck(schedule: Schedule, missing: dict[int, int]) -> ScheduleError:
    """The error that names the action that the first worker waits for, the next one, and so on.

    It ends where the actions wait in a circle, or at a result that is never made.

    Args:
        schedule: the schedule.
        missing: for the next action of each worker that is not done, by position, what it needs.
    """
    actions, worker = schedule.actions, schedule.columns.worker
    head_of = {int(worker[head]): head for head in missing}
    head, seen, links = min(missing), set(), []
    while head not in seen:
        seen.add(head)
        need = missing[head]
        if need < 0:
            links.append(f"{actions[head]} waits for a result that no earlier cycle makes")
            break
        links.append(f"{actions[head]} waits for {actions[need]}")
        following = head_of[int(worker[need])]
        if following != need:
            links[-1] += f", which comes after {actions[following]}"
        head = following
    first = actions[min(missing)]
    return failure(f"{first} waits for ever: {'; '.join(links)}", schedule.workers, first)
