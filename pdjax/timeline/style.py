"""Names and colours for drawings of timelines, and the stages of a worker.

Nothing here imports JAX or matplotlib.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from pdjax.schedules.action import KINDS
from pdjax.schedules.text import listed
from pdjax.timeline.timeline import SpanKind, Timeline, TransferKind, actions_of
from pdjax.units import format_seconds


class SpanStyle(NamedTuple):
    """How a kind of span is drawn.

    Attributes:
        fills: the fill of even and of odd microbatches.
        terminal: the codes of the same on a terminal; every terminal knows these.
        filling: the character that fills a box of text behind its name.
        trace: a colour's name in chrome://tracing; Perfetto has its own colours.
        hatch: a hatch over the fill, of programs that run several actions.
        mark: whether it is drawn as a line without a number: an update may take no time.
    """

    fills: tuple[str, str]
    terminal: tuple[str, str]
    filling: str
    trace: str
    hatch: str = ""
    mark: bool = False


STYLES: dict[SpanKind, SpanStyle] = {
    # Every kind has its own range of brightness, from F (dark) over I and B to W (light), so that
    # they differ in black and white, too.
    "F": SpanStyle(("#17396b", "#27589a"), ("44;97", "104;30"), "-", "thread_state_runnable"),
    "B": SpanStyle(("#ec9840", "#f6b774"), ("43;30", "103;30"), "=", "thread_state_iowait"),
    "I": SpanStyle(("#228c83", "#3fa79d"), ("46;30", "106;30"), "~", "thread_state_running"),
    "W": SpanStyle(("#d8e8a0", "#f0f7d4"), ("42;30", "102;30"), "_", "yellow"),
    "FB": SpanStyle(("#6b53a0", "#9d8aca"), ("45;97", "105;30"), "+", "generic_work", "//"),
    "FBU": SpanStyle(("#6b53a0", "#9d8aca"), ("45;97", "105;30"), "+", "generic_work", "xx"),
    "U": SpanStyle(("#b00020", "#b00020"), ("41;97", "41;97"), ":", "terrible", mark=True),
}
"""The style of each kind of span, in the order of legends."""

NAMES: dict[SpanKind, str] = {
    kind: listed([KINDS[letter].name for letter in actions_of(kind)], "and") for kind in STYLES
}
"""The name of each kind."""


class TransferStyle(NamedTuple):
    """How a kind of transfer is drawn: its name and its colour."""

    name: str
    fill: str


TRANSFER_STYLES: dict[TransferKind, TransferStyle] = {
    "F": TransferStyle("activations sent", "#7fa9df"),
    "B": TransferStyle("cotangents sent", "#a85510"),
    "R": TransferStyle("gradients all-reduced", "#303030"),
}
"""The style of each kind of transfer, in the order of legends."""


class TimeUnit(NamedTuple):
    """A unit of a time axis.

    Attributes:
        name: its name in full.
        symbol: its symbol behind a number.
        size_s: its size, in seconds.
    """

    name: str
    symbol: str
    size_s: float


_UNITS = (
    TimeUnit("seconds", "s", 1.0),
    TimeUnit("milliseconds", "ms", 1e-3),
    TimeUnit("microseconds", "µs", 1e-6),
)


def time_unit(stop_s: float) -> TimeUnit:
    """The unit for an axis up to a time in seconds: numbers of few digits."""
    return next((unit for unit in _UNITS if stop_s >= 2 * unit.size_s), _UNITS[-1])


def grey(color: str) -> float:
    """How bright ``"#rrggbb"`` is in black and white (Rec. 601), from 0 to 1."""
    red, green, blue = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def stages_by_worker(timeline: Timeline) -> list[list[int]]:
    """For each worker the stages that it has, in order: several if they are interleaved."""
    found: defaultdict[int, set[int]] = defaultdict(set)
    for span in timeline.spans:
        found[span.worker].add(span.stage)
    return [sorted(found[worker]) for worker in range(timeline.num_workers)]


def headline(timeline: Timeline) -> str:
    """The title, the makespan, and the share of waiting in it."""
    took = format_seconds(timeline.makespan_s)
    return f"{timeline.title}: makespan {took}, bubble {timeline.bubble_share:.1%}"


def check_suffix(path: str | PathLike[str], expected: Sequence[str]) -> None:
    """Raises ValueError if the name of a file does not end as one of those expected."""
    if Path(path).suffix.lower() not in expected:
        raise ValueError(
            f"{path} ends in {Path(path).suffix or 'nothing'!r}; expected {' or '.join(expected)}: "
            "give the file such a name."
        )
