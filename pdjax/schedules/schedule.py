"""A pipeline schedule as a value.

A schedule is, for every worker, the list of its actions during one *cycle*, which then repeats. A
cycle is the time in which the training loop hands over one minibatch of m microbatches (or a few
minibatches, where replicas take turns), so a microbatch is numbered relative to the first one of
the cycle. A negative number reaches back: in PipeDream a worker runs, cycle after cycle,

    F0  B-2  U-2        the forward of the newcomer, the backward and update of the one before last

and `Schedule.unroll` writes this out for a number of minibatches: the beginning, where there is
nothing yet to reach back to, and the end, where what is still in flight drains. Nothing here
imports JAX.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from pdjax.schedules.action import FORWARD, KINDS, LETTERS, Action, ScheduleError
from pdjax.schedules.columns import Columns
from pdjax.schedules.text import Grid, listed, read_action

_FARTHEST = 10**6  # microbatches that an action may reach back


@dataclass(frozen=True)
class Schedule:
    """The actions of every worker in one cycle, in order.

    ``print(schedule)`` shows it as a grid, which `Schedule.parse` reads back.

    Example:
        >>> schedule = Schedule.parse('''
        ... worker 0: 0F0 0F1     0B0 0B1 0U1
        ... worker 1:     1F0 1B0 1F1 1B1 1U1
        ... ''')
        >>> schedule.num_stages, schedule.num_microbatches
        (2, 2)

    Attributes:
        name: the algorithm's name.
        num_stages: number of stages.
        num_microbatches: microbatches in a minibatch, m.
        workers: for each worker its actions; microbatches count from the cycle's first one. A
            worker may run several stages, and a stage may be on several workers, its replicas,
            which take its microbatches in turns.
        num_minibatches: minibatches in a cycle.
    """

    name: str
    num_stages: int
    num_microbatches: int
    workers: tuple[tuple[Action, ...], ...]
    num_minibatches: int = 1

    def __post_init__(self) -> None:
        counts = {
            "stages": self.num_stages,
            "microbatches": self.num_microbatches,
            "minibatches": self.num_minibatches,
        }
        for what, count in counts.items():
            if count < 1:
                raise ScheduleError(f"got {count} {what}; expected at least one.")
        lowest = {kind: 0 if kind == FORWARD else -_FARTHEST for kind in KINDS}
        stages, brought = self.num_stages, self.cycle
        for kind, stage, microbatch in self.actions:
            if not 0 <= stage < stages or not lowest.get(kind, brought) <= microbatch < brought:
                self._refuse(Action(kind, stage, microbatch))

    def _refuse(self, action: Action) -> None:
        if action.kind not in KINDS:
            raise ScheduleError(
                f"unknown action {action}; expected a kind of {listed(LETTERS, 'or')}."
            )
        if not 0 <= action.stage < self.num_stages:
            raise ScheduleError(
                f"{action} names stage {action.stage}; expected 0 to {self.num_stages - 1}."
            )
        raise ScheduleError(
            f"{action} names microbatch {action.microbatch} of a cycle that brings {self.cycle}; a "
            "forward takes one of these, any other action one of these or an earlier one (a "
            "negative number)."
        )

    def __str__(self) -> str:
        sizes = self.num_stages, self.num_microbatches
        return str(Grid(self.name, *sizes, self.workers, self.num_minibatches))

    @property
    def cycle(self) -> int:
        """Number of microbatches that a cycle brings."""
        return self.num_microbatches * self.num_minibatches

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """The actions of all workers."""
        return tuple(action for worker in self.workers for action in worker)

    @cached_property
    def columns(self) -> Columns:
        """The actions of all workers as arrays."""
        return Columns.of(self.workers)

    @property
    def flushes(self) -> bool:
        """Whether every minibatch is done with before the next one (a synchronous schedule)."""
        return self.lag == 0 and self.num_minibatches == 1

    @cached_property
    def lag(self) -> int:
        """How many cycles back the actions reach."""
        lowest = min((action.microbatch for action in self.actions), default=0)
        return -(lowest // self.cycle)

    @cached_property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """For each stage the workers that run it."""
        found: list[list[int]] = [[] for _ in range(self.num_stages)]
        for number, worker in enumerate(self.workers):
            for stage in sorted({action.stage for action in worker}):
                found[stage].append(number)
        return tuple(map(tuple, found))

    @property
    def replicas(self) -> tuple[int, ...]:
        """For each stage the number of workers that run it."""
        return tuple(map(len, self.holders))

    def worker_of(self, stage: int, microbatch: int = 0) -> int:
        """The worker that runs `stage` for a microbatch: of several, they take turns.

        In every cycle the first one begins.
        """
        holders = self.holders[stage]
        if not holders:
            raise ScheduleError(f"no worker runs stage {stage}.")
        return holders[microbatch % self.cycle % len(holders)]

    @cached_property
    def per_update(self) -> tuple[int, ...]:
        """For each stage how many microbatches one update applies."""
        return tuple(self.columns.per_update(self.cycle).tolist())

    def stages_of(self, worker: int) -> tuple[int, ...]:
        """The stages that a worker runs, in ascending order."""
        return tuple(stage for stage in range(self.num_stages) if worker in self.holders[stage])

    def unrolled(self, num_minibatches: int) -> Columns:
        """The actions that `unroll` returns, as arrays."""
        return self.columns.repeated(num_minibatches * self.num_microbatches, self.cycle, self.lag)

    def unroll(self, num_minibatches: int) -> tuple[tuple[Action, ...], ...]:
        """Each worker's actions for `num_minibatches` minibatches and the drain after them.

        Microbatches are numbered from the first one of the first minibatch.
        """
        rows = self.unrolled(num_minibatches).rows()
        return tuple(tuple(map(Action._make, row)) for row in rows)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Reads a schedule from the grid that ``str(schedule)`` is, or one written by hand.

        Only the order of a worker's actions counts, not their columns. The first line may be left
        out where the actions imply its figures.

        Raises:
            ScheduleError: if there is something else in it; the text names the line.
        """
        return cls(**vars(Grid.parse(text)))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Schedule:
        """Reads a schedule from a text file.

        Raises:
            ValueError: if there is no such file, or something else in it.
        """
        try:
            return cls.parse(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the schedule {str(path)!r} cannot be read: {error}.") from error
        except ScheduleError as error:
            raise ScheduleError(f"{path}: {error}") from None

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the grid to a text file."""
        Path(path).write_text(f"{self}\n")

    def to_json(self) -> str:
        """The schedule as JSON, actions as text."""
        value = {
            "name": self.name,
            "num_stages": self.num_stages,
            "num_microbatches": self.num_microbatches,
            "num_minibatches": self.num_minibatches,
            "workers": [[str(action) for action in worker] for worker in self.workers],
        }
        return json.dumps(value)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Reads what `to_json` wrote.

        Raises:
            ScheduleError: if it is something else.
        """
        try:
            value: dict[str, Any] = json.loads(text)
            workers = tuple(tuple(map(read_action, worker)) for worker in value.pop("workers"))
            return cls(**value, workers=workers)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ScheduleError(f"this is no schedule in JSON: {error!r}.") from error
