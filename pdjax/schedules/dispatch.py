"""In which order one thread can dispatch the actions of a schedule."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from pdjax.schedules.columns import Columns
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
    waits = _Waits.of(schedule)
    order = waits.in_rounds()
    waits.check_done(schedule)
    return tuple(map(schedule.actions.__getitem__, order))


def check_order(schedule: Schedule) -> None:
    """Raises what `dispatch_order` would raise; in half the time, as it makes no order."""
    waits = _Waits.of(schedule)
    waits.in_any_order()
    waits.check_done(schedule)


@dataclass(eq=False)
class _Waits:
    """How far workers have got with the actions of a cycle, and what the others wait for.

    Lists of Python's numbers, as single entries are read and written all the time.

    Attributes:
        needs: for each action the positions of the two others whose results it needs.
        worker: for each action its worker.
        missing: for each action how many of these are not there yet; those that come earlier in
            its worker's own list are not counted.
        first: for each action where, among `asking`, those begin that wait for it.
        asking: the actions that wait for others.
        heads: for each worker its next action.
        stops: for each worker where its actions stop.
    """

    needs: np.ndarray
    worker: list[int]
    missing: list[int]
    first: list[int]
    asking: list[int]
    heads: list[int]
    stops: list[int]

    @classmethod
    def of(cls, schedule: Schedule) -> _Waits:
        columns = schedule.columns
        needs = needs_in_cycle(columns, schedule.cycle)
        at = np.indices(needs.shape)[1]
        there = needs >= 0
        own = there & (columns.worker[np.where(there, needs, 0)] == columns.worker) & (needs < at)
        waits = (needs != _EARLIER) & ~own
        asked, asking = needs[waits & there], at[waits & there]
        by_asked = np.argsort(asked, kind="stable")
        first = np.searchsorted(asked[by_asked], np.arange(len(columns) + 1))
        return cls(
            needs,
            columns.worker.tolist(),
            waits.sum(axis=0).tolist(),
            first.tolist(),
            asking[by_asked].tolist(),
            columns.starts[:-1].tolist(),
            columns.starts[1:].tolist(),
        )

    def ready(self) -> list[int]:
        """The workers that can do their next action."""
        ahead = enumerate(zip(self.heads, self.stops, strict=True))
        return [n for n, (head, stop) in ahead if head < stop and not self.missing[head]]

    def in_any_order(self) -> None:
        """Does all actions that can be done."""
        heads, stops, missing, worker = self.heads, self.stops, self.missing, self.worker
        turns = self.ready()
        while turns:
            number = turns.pop()
            head, stop = heads[number], stops[number]
            while head < stop and not missing[head]:
                for waiting in self.asking[self.first[head] : self.first[head + 1]]:
                    missing[waiting] -= 1
                    if not missing[waiting] and heads[worker[waiting]] == waiting:
                        turns.append(worker[waiting])
                head += 1
            heads[number] = head

    def in_rounds(self) -> list[int]:
        """Does all actions that can be done, in rounds; returns them in that order.

        In each round the workers in turn do their next action if they can. Only those are visited.
        """
        heads, stops, missing, worker = self.heads, self.stops, self.missing, self.worker
        count = len(heads)
        turns = self.ready()  # the round times the number of workers, plus the worker
        order = []
        while turns:
            turn = heappop(turns)
            number = turn % count
            head = heads[number]
            order.append(head)
            heads[number] = head + 1
            if head + 1 < stops[number] and not missing[head + 1]:
                heappush(turns, turn + count)
            for waiting in self.asking[self.first[head] : self.first[head + 1]]:
                missing[waiting] -= 1
                other = worker[waiting]
                if not missing[waiting] and heads[other] == waiting and other != number:
                    heappush(turns, turn - number + other + (count if other < number else 0))
        return order

    def check_done(self, schedule: Schedule) -> None:
        """Raises ScheduleError if a worker has actions left."""
        ahead = zip(self.heads, self.stops, strict=True)
        heads = [head for head, stop in ahead if head < stop]
        if heads:
            done = np.ones(len(self.worker) + 2, bool)
            for head, stop in zip(self.heads, self.stops, strict=True):
                done[head:stop] = False
            done[_NEVER] = False
            first, second = self.needs[:, heads]
            missing = np.where(done[first], second, first)
            raise _stuck(schedule, dict(zip(heads, missing.tolist(), strict=True)))


def needs_in_cycle(columns: Columns, cycle: int) -> np.ndarray:
    """What `Columns.inputs` says of the actions of a cycle, the results of other cycles included.

    -2 stands for what an earlier cycle made, or for nothing; -1 for what no earlier one does.
    """
    found, needed = columns.inputs(columns.microbatch % cycle, cycle)
    made = np.where(found >= 0, columns.microbatch[found], np.iinfo(np.int64).min)
    same, earlier = made == columns.microbatch, made > columns.microbatch
    return np.where(needed & same, found, np.where(needed & ~earlier, _NEVER, _EARLIER))


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
