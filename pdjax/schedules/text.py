"""Schedules as text: a grid with a row for each worker and a column for each unit of time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from pdjax.schedules.action import FORWARD, LETTERS, Action, ActionKind, ScheduleError
from pdjax.schedules.columns import Columns
from pdjax.schedules.walk import slots_of

_ACTION = re.compile(r"(\d+)([A-Z])(-?\d+)")
_ROW = re.compile(r"worker\s+(\d+)\s*:(.*)")
_HEADER = re.compile(
    r"(?P<name>[\w.-]+): (?P<stages>\d+) stages?, (?P<microbatches>\d+) microbatch(es)?"
    r"(, cycle of (?P<minibatches>\d+) minibatches)?"
)
_MOST_COLUMNS, _MOST_ROWS = 40, 24  # of a grid in an error


@dataclass(frozen=True)
class Grid:
    """The content of a grid: the arguments of a `pdjax.schedules.Schedule`."""

    name: str
    num_stages: int
    num_microbatches: int
    workers: tuple[tuple[Action, ...], ...]
    num_minibatches: int

    def __str__(self) -> str:
        header = (
            f"{self.name}: {_count(self.num_stages, 'stage')}, "
            f"{_count(self.num_microbatches, 'microbatch')}"
        )
        if self.num_minibatches > 1:
            header += f", cycle of {self.num_minibatches} minibatches"
        return f"{header}\n{draw(self.workers)}"

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Reads a grid; see `pdjax.schedules.Schedule.parse`.

        Raises:
            ScheduleError: if there is something else in it; the text names the line.
        """
        header, workers = _read(text)
        if header is not None:
            return cls(
                header["name"],
                int(header["stages"]),
                int(header["microbatches"]),
                workers,
                int(header["minibatches"] or 1),
            )
        actions = [action for worker in workers for action in worker]
        stages = 1 + max((action.stage for action in actions), default=0)
        brought = 1 + max((a.microbatch for a in actions if a.kind == FORWARD), default=0)
        return cls("custom", stages, brought, workers, 1)


def _count(number: int, what: str) -> str:
    plural = "" if number == 1 else "es" if what.endswith("h") else "s"
    return f"{number} {what}{plural}"


def _read(text: str) -> tuple[re.Match[str] | None, tuple[tuple[Action, ...], ...]]:
    """The first line of a grid, if it has figures, and the rows of workers."""
    header: re.Match[str] | None = None
    workers: list[tuple[Action, ...]] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        row = _ROW.fullmatch(line)
        if row:
            if int(row[1]) != len(workers):
                raise ScheduleError(
                    f"line {number} is of worker {row[1]}; expected worker {len(workers)}."
                )
            workers.append(tuple(_read_row(row[2], number)))
        elif line and not workers and header is None and (found := _HEADER.fullmatch(line)):
            header = found
        elif line:
            raise ScheduleError(
                f"line {number} is {line!r}; expected a row such as 'worker 0: 0F0 0B0 0U0', "
                "before the first one perhaps 'gpipe: 2 stages, 4 microbatches'."
            )
    if not workers:
        raise ScheduleError("there is no row; expected one such as 'worker 0: 0F0 0B0 0U0'.")
    return header, tuple(workers)


def _read_row(text: str, line: int) -> Iterator[Action]:
    for word in text.replace("|", " ").split():  # a bar stands before actions that never start
        try:
            yield read_action(word)
        except ScheduleError as error:
            raise ScheduleError(f"line {line}: {error}") from None


def listed(names: Sequence[str], last: str) -> str:
    """Names one after the other, with a word before the last of several."""
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def read_action(text: str) -> Action:
    """Reads an action such as ``2F0``.

    Raises:
        ScheduleError: if it is none.
    """
    found = _ACTION.fullmatch(text)
    if not found or found[2] not in LETTERS:
        raise ScheduleError(
            f"{text!r} is no action; expected the stage, one of {listed(LETTERS, 'and')}, and the "
            "microbatch, such as 2F0."
        )
    return Action(cast(ActionKind, found[2]), int(found[1]), int(found[3]))


def draw(workers: Sequence[Sequence[Action]], mark: Action | None = None) -> str:
    """Draws lists of actions as a grid: a row for each worker, a column for each time slot.

    Every action takes one slot and starts as soon as what it needs is done. Actions that never
    can start stand after a bar. `mark` is set between arrows, and of a large grid only what is
    around it is drawn.
    """
    slots = slots_of(Columns.of(workers))
    end = 1 + max(slots, default=-1)
    each = iter(slots)
    rows: list[list[str]] = []
    for worker in workers:
        cells, stuck = [""] * end, []
        for action, slot in zip(worker, each, strict=False):
            text = f">{action}<" if action == mark else str(action)
            if slot >= 0:
                cells[slot] = text
            else:
                stuck.append(text)
        rows.append(cells + (["|", *stuck] if stuck else []))
    return _aligned(rows, mark)


def failure(problem: str, workers: Sequence[Sequence[Action]], action: Action) -> ScheduleError:
    """The error that tells of a problem and shows the action in the grid."""
    return ScheduleError(f"the schedule cannot be run: {problem}.\n{draw(workers, mark=action)}")


def _aligned(rows: list[list[str]], mark: Action | None) -> str:
    """Lines whose columns are equally wide; around a mark only what has room."""
    numbers = list(range(len(rows)))
    before = after = ""
    if mark is not None:
        numbers, first, last = _window(rows, f">{mark}<")
        longest = max(map(len, rows), default=0)
        before, after = ("… " if first else ""), (" …" if last < longest else "")
        rows = [row[first:last] for row in rows]
    width = max((len(rows[n][c]) for n in numbers for c in range(len(rows[n]))), default=0)
    lines = []
    for number in numbers:
        line = " ".join(cell.ljust(width) for cell in rows[number])
        lines.append(f"worker {number}: {before}{line}{after}".rstrip())
    return "\n".join(lines)


def _window(rows: list[list[str]], marked: str) -> tuple[list[int], int, int]:
    """The rows and the columns around a cell; all if they are few."""
    row, column = next(
        ((r, cells.index(marked)) for r, cells in enumerate(rows) if marked in cells), (0, 0)
    )
    top = max(0, min(row - _MOST_ROWS // 2, len(rows) - _MOST_ROWS))
    longest = max(map(len, rows), default=0)
    first = max(0, min(column - _MOST_COLUMNS // 2, longest - _MOST_COLUMNS))
    return list(range(len(rows)))[top : top + _MOST_ROWS], first, first + _MOST_COLUMNS
