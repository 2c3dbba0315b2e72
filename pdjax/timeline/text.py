"""A timeline as text for the terminal.

Nothing here imports JAX or matplotlib.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from pdjax.timeline.style import NAMES, STYLES, headline, stages_by_worker, time_unit
from pdjax.timeline.timeline import Span, Timeline

_LEAST = 40  # columns
_TICK = 8  # columns from one time on the ruler to the next, at least

_FILLINGS = {style.filling for style in STYLES.values()}


def draw_timeline(timeline: Timeline, width: int = 100, *, color: bool = False) -> str:
    """Draws a timeline: a row for each worker, in which time runs to the right.

    A span is its kind and its microbatch, filled up to where it ends; nothing stands where a
    worker waits. Behind each row is the share of the time in which it did not.

    >>> from pdjax.timeline import Span, Timeline
    >>> spans = [
    ...     Span(0, "F", 0, 0, 0.0, 0.1),
    ...     Span(1, "F", 1, 0, 0.1, 0.2),
    ...     Span(1, "B", 1, 0, 0.2, 0.4),
    ...     Span(0, "B", 0, 0, 0.4, 0.6),
    ... ]
    >>> print(draw_timeline(Timeline.of("one microbatch", 2, spans), width=46))
    one microbatch: makespan 600 ms, bubble 50.0%
    worker 0 |F0---               B0========|  50%
    worker 1 |     F0---B0========          |  50%
          ms  |0        |200      |400
    F: forward, B: backward

    Args:
        timeline: the timeline.
        width: columns of the terminal.
        color: whether to write ANSI colour codes.

    Returns:
        Lines of at most `width` characters; colour codes are not counted.

    Raises:
        ValueError: if there are too few columns.
    """
    if width < _LEAST:
        raise ValueError(f"got a width of {width}; expected at least {_LEAST} columns.")
    names = [f"worker {worker}" for worker in range(timeline.num_workers)]
    margin = max(map(len, names), default=0)
    columns = width - margin - len(" || 100%")
    stages = stages_by_worker(timeline)
    lines, left_out = textwrap.wrap(headline(timeline), width), 0
    for worker, name in enumerate(names):
        row = _Row(columns, columns / (timeline.makespan_s or 1.0))
        row.draw(timeline.spans_of(worker), stages[worker])
        left_out += row.left_out
        share = timeline.utilisation(worker)
        lines.append(f"{name:>{margin}} |{row.text(color)}|{share:5.0%}")
    unit = time_unit(timeline.makespan_s)
    ruler = _ruler(timeline.makespan_s / unit.size_s, columns)
    lines.append(f"{unit.symbol:>{margin}}  {ruler}".rstrip())
    lines += textwrap.wrap(_legend(timeline, stages, left_out), width)
    return "\n".join(lines)


class _Row:
    """The columns of one worker: characters, and the colour of each."""

    def __init__(self, columns: int, columns_per_s: float) -> None:
        self.left_out = 0
        self._scale = columns_per_s
        self._cells = [" "] * columns
        self._codes = [""] * columns

    def draw(self, spans: Sequence[Span], stages: Sequence[int]) -> None:
        """Draws the spans of a worker that has these stages."""
        marks = []
        for span in spans:
            first, end = self._column(span.start_s), self._column(span.end_s)
            if end > first:
                self._write(first, _box(span, stages, end - first), span)
            elif STYLES[span.kind].mark:  # may take no time, and still matters
                marks.append((first, span))
            else:
                self.left_out += 1
        for column, span in marks:
            self._mark(column, span)

    def text(self, color: bool) -> str:
        """The columns, each run of one colour between its codes if there are to be any."""
        if not color:
            return "".join(self._cells)
        parts, active = [], ""
        for cell, code in zip([*self._cells, ""], [*self._codes, ""], strict=True):
            if code != active:
                parts.append("\x1b[0m" * bool(active) + f"\x1b[{code}m" * bool(code))
                active = code
            parts.append(cell)
        return "".join(parts)

    def _column(self, time_s: float) -> int:
        """The column that begins nearest to a time."""
        return math.floor(time_s * self._scale + 0.5)

    def _write(self, first: int, text: str, span: Span) -> None:
        for column, cell in enumerate(text, first):
            self._cells[column] = cell
            self._codes[column] = STYLES[span.kind].terminal[span.microbatch % 2]

    def _mark(self, column: int, span: Span) -> None:
        """Puts a letter where it hides no other: into the gap behind, or the filling before."""
        for at in (column, column - 1):
            if 0 <= at < len(self._cells) and self._cells[at] in {" ", *_FILLINGS}:
                self._write(at, span.kind, span)
                return
        self.left_out += 1


def _box(span: Span, stages: Sequence[int], room: int) -> str:
    """As much of a span's name as there is room for, and filling."""
    kind = span.kind if stages.index(span.stage) % 2 == 0 else span.kind.lower()
    names = [f"{kind}{span.microbatch}", kind, kind[0]]
    whole = f"{kind}{span.microbatch}.{span.stage}"
    if len(stages) > 1 and len(whole) < room:
        names.insert(0, whole)
    name = next(name for name in names if len(name) <= room)
    return name.ljust(room, STYLES[span.kind].filling)


def _ruler(stop: float, columns: int) -> str:
    """Round times, each behind a stroke at its column."""
    if not stop:
        return "|0"
    least = stop * _TICK / columns
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    cells = [" "] * columns
    for number in range(int(stop / step) + 1):
        text = f"|{number * step:.6g}"
        at = math.floor(number * step * columns / stop + 0.5)
        if at + len(text) <= columns:
            cells[at : at + len(text)] = text
    return "".join(cells)


def _legend(timeline: Timeline, stages: Sequence[Sequence[int]], left_out: int) -> str:
    present = {span.kind for span in timeline.spans}
    parts = [f"{kind}: {name}" for kind, name in NAMES.items() if kind in present]
    text = ", ".join(parts)
    if any(len(those) > 1 for those in stages):
        text += "; small letters: every second stage of a worker; F2.4: microbatch 2 in stage 4"
    if left_out:
        text += f"; {left_out} of {len(timeline.spans)} are shorter than a column and left out"
    return text
