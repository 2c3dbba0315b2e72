"""Schedules as text: a grid with a row for each worker and a column for each unit of time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from pdjax.schedules.columns import Columns
from pdjax.schedules.schedule import Action, ActionKind, Schedule, ScheduleError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ACTION = re.compile(r"(\d+)([A-Z])(-?\d+)")
_ROW = re.compile(r"worker\s+(\d+)\s*:(.*)")
_HEADER = re.compile(
    r"(?P<name>[\w.-]+): (?P<stages>\d+) stages?, (?P<microbatches>\d+) microbatch(es)?"
    r"(, cycle of (?P<minibatches>\d+) minibatches)?"
)
_MOST_COLUMNS, _MOST_ROWS = 40, 24  # of a grid in an error


def to_text(schedule: Schedule) -> str:
    """A line with the figures, and the grid."""
    lines = [
        f"{schedule.name}: {_count(schedule.num_stages, 'stage')}, "
        f"{_count(schedule.num_microbatches, 'microbatch')}"
    ]
    if schedule.num_minibatches > 1:
        lines[0] += f", cycle of {schedule.num_minibatches} minibatches"
    return "\n".join([*lines, draw(schedule.workers)])


def _count(number: int, what: str) -> str:
    plural = "" if number == 1 else "es" if what.endswith("h") else "s"
    return f"{number} {what}{plural}"


def from_text(text: str) -> Schedule:
    """Reads a grid; see `Schedule.parse`."""
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
    actions = [action for worker in workers for action in worker]
    if header is None:
        stages = 1 + max((action.stage for action in actions), default=0)
        brought = 1 + max((a.microbatch for a in actions if a.kind == "F"), default=0)
        return Schedule("custom", stages, brought, tuple(workers))
    return Schedule(
        header["name"],
        int(header["stages"]),
        int(header["microbatches"]),
        tuple(workers),
        int(header["minibatches"] or 1),
    )


def _read_row(text: str, line: int) -> Iterator[Action]:
    for word in text.replace("|", " ").split():  # the bar before what waits for ever
        try:
            yield read_action(word)
        except ScheduleError as error:
            raise ScheduleError(f"line {line}: {error}") from None


def read_action(text: str) -> Action:
    """Reads an action such as ``2F0``.

    Raises:
        ScheduleError: if it is none.
    """
    found = _ACTION.fullmatch(text)
    if not found or found[2] not in "FBIWU":
        raise ScheduleError(
            f"{text!r} is no action; expected the stage, one of F, B, I, W and U, and the "
            "microbatch, such as 2F0."
        )
    return Action(cast(ActionKind, found[2]), int(found[1]), int(found[3]))


def draw(workers: Sequence[Sequence[Action]], mark: Action | None = None) -> str:
    """Draws lists of actions as a grid: a row for each worker, a column for each time slot.

    Every action takes one slot and starts as soon as what it needs is done. Actions that never
    can start stand after a bar. `mark` is set between arrows, and of a large grid only what is
    around it is drawn.
    """
    slots = Columns.of(workers).slots()
    end = 1 + int(slots.max(initial=-1))
    each = iter(slots.tolist())
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
    return _laid_out(rows, mark)


def failure(problem: str, workers: Sequence[Sequence[Action]], action: Action) -> ScheduleError:
    """The error that tells of a problem and shows the action in the grid."""
    return ScheduleError(f"the schedule cannot be run: {problem}.\n{draw(workers, mark=action)}")


def _laid_out(rows: list[list[str]], mark: Action | None) -> str:
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
