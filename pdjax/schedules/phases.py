"""What one thread can dispatch with each minibatch of a cycle.

Where the replicas of a stage take turns, a cycle brings several minibatches, one after the other,
and an update waits for the gradients of all replicas. Nothing here imports JAX.
"""

from __future__ import annotations

from typing import NamedTuple

from pdjax.schedules.dispatch import dispatch_order
from pdjax.schedules.schedule import Action, Schedule, inputs_of
from pdjax.schedules.text import failure


class Turn(NamedTuple):
    """One thing to dispatch.

    Attributes:
        worker: whose it is.
        action: what is done; the microbatch counts from the first one of the minibatch.
    """

    worker: int
    action: Action


def dispatch_phases(schedule: Schedule) -> tuple[tuple[Turn, ...], ...]:
    """For each minibatch of a cycle what is dispatched once it is handed over, in order.

    It is all that can be dispatched then, once the schedule is under way. While it fills and
    drains, the same order holds for the actions that there are.

    Raises:
        ScheduleError: if a worker waits for ever.
    """
    if max(schedule.replicas) == 1:
        order = dispatch_order(schedule)
        return (tuple(Turn(schedule.worker_of(a.stage), a) for a in order),)
    cycles = 2 * schedule.lag + 3
    num_steps = cycles * schedule.num_minibatches
    steps = _Dispatch(schedule, num_steps).run()
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
            more = schedule.per_update[stage] - 1 if kind == "U" else 0
            behind = max(behind, more - microbatch)
    return -(-behind // schedule.num_microbatches)


class _Dispatch:
    """Dispatches a schedule that is written out, as far as it can with each minibatch."""

    def __init__(self, schedule: Schedule, num_steps: int) -> None:
        self.schedule = schedule
        self.num_steps = num_steps
        self.lists = schedule.unroll(num_steps)
        self.at = [0] * len(self.lists)
        self.done: set[Action] = set()
        self.gradients: set[tuple[int, int]] = set()  # stages and microbatches

    def run(self) -> list[list[tuple[int, Action]]]:
        """For each minibatch what was dispatched, and by whom; the drain comes with the last."""
        steps = []
        for step in range(self.num_steps):
            fed = (step + 1) * self.schedule.num_microbatches
            steps.append(self._step(fed))
        for number, actions in enumerate(self.lists):
            if self.at[number] < len(actions):
                stuck = actions[self.at[number]]
                raise failure(f"{stuck} on worker {number} waits for ever", self.lists, stuck)
        return steps

    def _step(self, fed: int) -> list[tuple[int, Action]]:
        found: list[tuple[int, Action]] = []
        moved = True
        while moved:
            moved = False
            for number, actions in enumerate(self.lists):
                if self.at[number] == len(actions):
                    continue
                action = actions[self.at[number]]
                if action.microbatch < fed and self._is_ready(action):
                    self._do(action)
                    found.append((number, action))
                    self.at[number] += 1
                    moved = True
        return found

    def _is_ready(self, action: Action) -> bool:
        kind, stage, last = action
        if kind != "U":
            return self.done.issuperset(inputs_of(action, self.schedule.num_stages))
        size = self.schedule.per_update[stage]
        return all((stage, k) in self.gradients for k in range(last // size * size, last + 1))

    def _do(self, action: Action) -> None:
        kind, stage, microbatch = action
        self.done.add(action)
        if kind == "I":  # what the stage before it waits for
            self.done.add(Action("B", stage, microbatch))
        if kind in ("B", "W"):
            self.gradients.add((stage, microbatch))
