"""In which order one thread can dispatch the actions of a schedule."""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np

from pdjax.schedules.columns import B, Columns, I, U
from pdjax.schedules.schedule import Action, Schedule, ScheduleError
from pdjax.schedules.text import failure

_EARLIER, _NEVER = -2, -1  # what stands for the results of earlier and of later cycles


def dispatch_order(schedule: Schedule) -> tuple[Action, ...]:
    """The actions of one cycle in an order in which a single thread can dispatch them.

    It keeps the order of every worker's list, and no action comes before one whose result it
    needs. Taken cycle after cycle it is also the order in which the executor drains.

    Raises:
        ScheduleError: if an action needs a result of a later cycle, or actions wait in a circle.
    """
    columns, actions = schedule.columns, schedule.actions
    needs = needs_in_cycle(columns, schedule.cycle)
    order = _in_rounds(columns, needs)
    if len(order) < len(actions):
        done = np.zeros(len(actions) + 2, bool)
        done[order] = done[_EARLIER] = True
        heads = columns.starts[:-1] + np.bincount(
            columns.worker[order], minlength=columns.num_workers
        )
        heads = heads[heads < columns.starts[1:]]
        first, second = needs[:, heads]
        missing = np.where(done[first], second, first)
        raise _stuck(schedule, dict(zip(heads.tolist(), missing.tolist(), strict=True)))
    return tuple(map(actions.__getitem__, order))


def _in_rounds(columns: Columns, needs: np.ndarray) -> list[int]:
    """Actions in rounds: in each one, the workers in turn do their next action if they can.

    Of a round only those workers are visited that can. Returns fewer actions if the others never
    can.
    """
    at, last = np.indices(needs.shape)[1], len(columns)
    # what comes earlier in the worker's own list need not be waited for
    own = (columns.worker[needs] == columns.worker) & (needs >= 0) & (needs < at)
    waits = (needs != _EARLIER) & ~own
    missing = waits.sum(axis=0).tolist()
    asked, asking = needs[waits & (needs >= 0)], at[waits & (needs >= 0)]
    by_asked = np.argsort(asked, kind="stable")
    asking = asking[by_asked].tolist()
    first = np.searchsorted(asked[by_asked], np.arange(last + 1)).tolist()
    worker, count = columns.worker.tolist(), columns.num_workers
    heads, stops = columns.starts[:-1].tolist(), columns.starts[1:].tolist()
    # round times the number of workers, plus the worker
    turns = [n for n in range(count) if heads[n] < stops[n] and not missing[heads[n]]]
    order = []
    while turns:
        turn = heappop(turns)
        number = turn % count
        head = heads[number]
        order.append(head)
        heads[number] = head + 1
        if head + 1 < stops[number] and not missing[head + 1]:
            heappush(turns, turn + count)
        for waiting in asking[first[head] : first[head + 1]]:
            missing[waiting] -= 1
            other = worker[waiting]
            if not missing[waiting] and heads[other] == waiting and other != number:
                heappush(turns, turn - number + other + (count if other < number else 0))
    return order


def needs_in_cycle(columns: Columns, cycle: int) -> np.ndarray:
    """For each action of a cycle the positions of the two others whose results it needs.

    The first row has that of a neighbouring stage or its input part, the second its forward pass.

    -2 stands for what an earlier cycle made, or for nothing; -1 for what no earlier one does.
    """
    group = np.array([0, 1, 1, 2, 3])[columns.kind]
    num_stages = int(columns.stage.max(initial=0)) + 1
    turn = columns.microbatch % cycle
    where = np.full((4, num_stages + 2, cycle), -1)
    where[group, columns.stage + 1, turn] = np.arange(len(columns))
    step = np.array([-1, 1, 1, 0, 0])[columns.kind]
    wanted = np.array([0, 1, 1, 1, 3])[columns.kind]
    neighbour = columns.stage + step
    found = np.stack([where[wanted, neighbour + 1, turn], where[0, columns.stage + 1, turn]])
    made = np.where(found >= 0, columns.microbatch[found], np.iinfo(np.int64).min)
    same, earlier = made == columns.microbatch, made > columns.microbatch
    needs = np.where(same, found, np.where(earlier, _EARLIER, _NEVER))
    free = (columns.kind == U) | (neighbour < 0) | (neighbour >= num_stages)
    needs[0, free] = _EARLIER
    needs[1, (columns.kind != B) & (columns.kind != I)] = _EARLIER
    return needs


def _stuck(schedule: Schedule, missing: dict[int, int]) -> ScheduleError:
    """Tells what the first worker waits for, and what that waits for, until it goes in a circle.

    Args:
        schedule: the schedule.
        missing: for the next action of each worker that is not done, by position, what it needs.
    """
    actions, worker = schedule.actions, schedule.columns.worker
    head_of = {int(worker[head]): head for head in missing}
    head, told, links = min(missing), set(), []
    while head not in told:
        told.add(head)
        need = missing[head]
        if need == _NEVER:
            links.append(f"{actions[head]} waits for a result that no earlier cycle makes")
            break
        links.append(f"{actions[head]} waits for {actions[need]}")
        following = head_of[int(worker[need])]
        if following != need:
            links[-1] += f", which comes after {actions[following]}"
        head = following
    first = actions[min(missing)]
    return failure(f"{first} waits for ever: {'; '.join(links)}", schedule.workers, first)
