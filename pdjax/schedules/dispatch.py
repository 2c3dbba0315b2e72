"""In which order one thread can dispatch the actions of a schedule."""

from __future__ import annotations

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
    columns = schedule.columns
    neighbours, forwards = needs_in_cycle(columns, schedule.cycle).tolist()
    actions, starts = schedule.actions, columns.starts.tolist()
    at, stops = starts[:-1], starts[1:]
    done = [*[False] * len(actions), True, False]  # the last two: _EARLIER, _NEVER
    order: list[Action] = []
    waiting = [number for number in range(columns.num_workers) if at[number] < stops[number]]
    while waiting:
        before = len(order)
        for number in waiting:
            head = at[number]
            if done[neighbours[head]] and done[forwards[head]]:
                order.append(actions[head])
                done[head] = True
                at[number] = head + 1
        if len(order) == before:
            missing = {
                at[number]: neighbours[at[number]]
                if not done[neighbours[at[number]]]
                else forwards[at[number]]
                for number in waiting
            }
            raise _stuck(schedule, missing)
        waiting = [number for number in waiting if at[number] < stops[number]]
    return tuple(order)


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
