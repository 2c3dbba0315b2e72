"""A pipeline schedule as a value.

A schedule is, for every worker, the list of its actions during one *step*: the time in which the
training loop hands over one minibatch of m microbatches. Steps repeat for ever, so a microbatch is
numbered relative to the first one of the step. A negative number reaches back: in PipeDream a
worker runs, step after step,

    F0  B-2  U-2        the forward of the newcomer, the backward and update of the one before last

and `Schedule.unroll` writes this out for a number of steps: the beginning, where there is nothing
yet to reach back to, and the end, where what is still in flight drains. Nothing here imports JAX.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

ActionKind = Literal["F", "B", "U"]
"""Forward pass, backward pass, update of the weights."""


@dataclass(frozen=True, order=True)
class Action:
    """One thing that a worker does.

    Attributes:
        kind: ``"F"``, ``"B"`` or ``"U"``.
        stage: the stage that it is done for.
        microbatch: the microbatch; for an update the last one whose gradient it applies.
    """

    kind: ActionKind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    def shifted(self, by: int) -> Action:
        """The same action for the microbatch `by` further on."""
        return Action(self.kind, self.stage, self.microbatch + by)


class ScheduleError(ValueError):
    """A schedule that cannot be run; the text shows it as a grid with the action marked."""


@dataclass(frozen=True)
class Schedule:
    """What every worker does in one step, in order.

    Attributes:
        name: the algorithm's name.
        num_stages: number of stages.
        num_microbatches: microbatches in a minibatch, m.
        workers: for each worker its actions; microbatches count from the step's first one. Every
            stage has one update for each minibatch.
    """

    name: str
    num_stages: int
    num_microbatches: int
    workers: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        for what, count in (("stages", self.num_stages), ("microbatches", self.num_microbatches)):
            if count < 1:
                raise ScheduleError(f"got {count} {what}; expected at least one.")
        for action in self.actions:
            if action.kind not in ("F", "B", "U"):
                raise ScheduleError(f"unknown action {action}; expected a kind of F, B or U.")
            if not 0 <= action.stage < self.num_stages:
                raise ScheduleError(
                    f"{action} names stage {action.stage}; expected 0 to {self.num_stages - 1}."
                )
            lowest = 0 if action.kind == "F" else -(10**6)
            if not lowest <= action.microbatch < self.num_microbatches:
                raise ScheduleError(
                    f"{action} names microbatch {action.microbatch} of a step that brings "
                    f"{self.num_microbatches}; a forward takes one of these, a backward or an "
                    "update one of these or an earlier one (a negative number)."
                )

    def __str__(self) -> str:
        return f"{self.name}\n{draw(self.workers)}"

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """The actions of all workers."""
        return tuple(action for worker in self.workers for action in worker)

    @cached_property
    def flushes(self) -> bool:
        """Whether every microbatch is done with when its step ends (a synchronous schedule)."""
        return self.lag == 0

    @cached_property
    def lag(self) -> int:
        """How many steps back the actions reach."""
        lowest = min((action.microbatch for action in self.actions), default=0)
        return -(lowest // self.num_microbatches)

    def worker_of(self, stage: int) -> int:
        """The worker that runs `stage`."""
        for number, worker in enumerate(self.workers):
            if any(action.stage == stage for action in worker):
                return number
        raise ScheduleError(f"no worker runs stage {stage}.")

    def unroll(self, num_steps: int) -> tuple[tuple[Action, ...], ...]:
        """Each worker's actions for `num_steps` steps and the drain after them.

        Microbatches are numbered from the first one of the first step.
        """
        fed = num_steps * self.num_microbatches

        def written_out(worker: Iterable[Action]) -> tuple[Action, ...]:
            shifts = [step * self.num_microbatches for step in range(num_steps + self.lag)]
            actions = (action.shifted(shift) for shift in shifts for action in worker)
            return tuple(action for action in actions if 0 <= action.microbatch < fed)

        return tuple(written_out(tuple(worker)) for worker in self.workers)

    def to_json(self) -> str:
        """The schedule as JSON, actions as text."""
        value = {
            "name": self.name,
            "num_stages": self.num_stages,
            "num_microbatches": self.num_microbatches,
            "workers": [[str(action) for action in worker] for worker in self.workers],
        }
        return json.dumps(value)


def inputs_of(action: Action, num_stages: int) -> list[Action]:
    """The actions whose results an action needs, whoever runs them.

    An update needs the backward passes of its own stage; that is a matter of its worker's order.
    """
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return [Action("F", stage - 1, microbatch)] if stage > 0 else []
    if action.kind == "B":
        later = [Action("B", stage + 1, microbatch)] if stage + 1 < num_stages else []
        return [Action("F", stage, microbatch), *later]
    return [Action("B", stage, microbatch)]


def draw(workers: Sequence[Sequence[Action]], mark: Action | None = None) -> str:
    """Draws lists of actions as a grid: a row for each worker, a column for each time slot.

    Every action takes one slot and starts as soon as what it needs is done. Actions that never
    can start stand after a bar. `mark` is set between arrows.
    """
    columns = _columns(workers)
    end = 1 + max(columns.values(), default=-1)
    rows = []
    for worker in workers:
        cells = [""] * end
        stuck = []
        for action in worker:
            text = f">{action}<" if action == mark else str(action)
            if action in columns:
                cells[columns[action]] = text
            else:
                stuck.append(text)
        rows.append(cells + (["|", *stuck] if stuck else []))
    width = max((len(cell) for row in rows for cell in row), default=0)
    lines = [" ".join(cell.ljust(width) for cell in row).rstrip() for row in rows]
    return "\n".join(f"worker {number}: {line}" for number, line in enumerate(lines))


def _columns(workers: Sequence[Sequence[Action]]) -> dict[Action, int]:
    """The time slot of every action that can run, if each takes one slot."""
    everything = {action for worker in workers for action in worker}
    num_stages = 1 + max((action.stage for action in everything), default=0)
    columns: dict[Action, int] = {}
    position, free_at = [0] * len(workers), [0] * len(workers)
    progress = True
    while progress:
        progress = False
        for number, worker in enumerate(workers):
            while position[number] < len(worker):
                action = worker[position[number]]
                needs = [a for a in inputs_of(action, num_stages) if a in everything]
                if any(need not in columns for need in needs):
                    break
                ready = max((columns[need] + 1 for need in needs), default=0)
                columns[action] = max(ready, free_at[number])
                free_at[number] = columns[action] + 1
                position[number] += 1
                progress = True
    return columns
