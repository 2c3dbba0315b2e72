"""A walk through the actions of many workers: each in its turn, none before what it needs.

Nothing here imports JAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from pdjax.schedules.columns import Columns
from pdjax.schedules.dependencies import Needs, find_needs


@dataclass(eq=False)
class Walk:
    """The progress of workers through their actions, and the needs of the actions that are left.

    Lists of Python's numbers, as single entries are read and written all the time.

    Attributes:
        worker: for each action its worker.
        missing: for each action the number of needed actions that are not done; an action earlier
            in its worker's own list is not counted.
        first: for each action the first position in `waiting` of the actions that need it.
        waiting: the actions that need others.
        heads: for each worker its next action.
        stops: for each worker the position behind its last action.
    """

    worker: list[int]
    missing: list[int]
    first: list[int]
    waiting: list[int]
    heads: list[int]
    stops: list[int]

    @classmethod
    def of(cls, columns: Columns, needs: Needs) -> Walk:
        """A walk that begins with nothing done; an action that needs -1 is never done."""
        there = needs.need >= 0
        same = columns.worker[needs.need] == columns.worker[needs.action]
        needs = needs.take(~(there & same & (needs.need < needs.action)))
        missing = np.bincount(needs.action, minlength=len(columns))
        needs = needs.take(needs.need >= 0).sorted_by("need")
        first = np.searchsorted(needs.need, np.arange(len(columns) + 1))
        return cls(
            columns.worker.tolist(),
            missing.tolist(),
            first.tolist(),
            needs.action.tolist(),
            columns.starts[:-1].tolist(),
            columns.starts[1:].tolist(),
        )

    def ready(self) -> list[int]:
        """The workers that can do their next action."""
        ahead = enumerate(zip(self.heads, self.stops, strict=True))
        return [n for n, (head, stop) in ahead if head < stop and not self.missing[head]]

    def stuck(self) -> list[int]:
        """The next actions of the workers that are not done."""
        ahead = zip(self.heads, self.stops, strict=True)
        return [head for head, stop in ahead if head < stop]

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
            for waiting in self.waiting[self.first[head] : self.first[head + 1]]:
                missing[waiting] -= 1
                other = worker[waiting]
                if not missing[waiting] and heads[other] == waiting and other != number:
                    heappush(turns, turn - number + other + (count if other < number else 0))
        return order

    def in_any_order(self) -> None:
        """Does all actions that can be done, in half the time of `in_rounds`."""
        heads, stops, missing, worker = self.heads, self.stops, self.missing, self.worker
        turns = self.ready()
        while turns:
            number = turns.pop()
            head, stop = heads[number], stops[number]
            while head < stop and not missing[head]:
                for waiting in self.waiting[self.first[head] : self.first[head + 1]]:
                    missing[waiting] -= 1
                    if not missing[waiting] and heads[worker[waiting]] == waiting:
                        turns.append(worker[waiting])
                head += 1
            heads[number] = head


def slots_of(columns: Columns) -> list[int]:
    """When each action starts if each takes one unit of time; -1 if it never can.

    A need of an action that is not among them counts as satisfied.

    Example:
        The backward pass of stage 1 waits for that of stage 2, which is not among the actions.

        >>> slots_of(Columns.of([[("F", 0, 0), ("B", 0, 0)], [("F", 1, 0), ("B", 1, 0)]]))
        [0, 3, 1, 2]
    """
    needs = find_needs(columns)
    walk = Walk.of(columns, needs.take(needs.need >= 0))
    slots, earliest, free = [-1] * len(columns), [0] * len(columns), [0] * columns.num_workers
    for at in walk.in_rounds():
        slots[at] = max(free[walk.worker[at]], earliest[at])
        free[walk.worker[at]] = slots[at] + 1
        for waiting in walk.waiting[walk.first[at] : walk.first[at + 1]]:
            earliest[waiting] = max(earliest[waiting], slots[at] + 1)
    return slots
