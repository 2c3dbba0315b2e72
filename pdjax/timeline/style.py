"""What drawings of timelines share: names, colours, and the stages of a worker.

Nothing here imports JAX or matplotlib.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from pdjax.timeline.timeline import SpanKind, Timeline, TransferKind
from pdjax.units import format_seconds

NAMES: dict[SpanKind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "input gradients",
    "W": "weight gradients",
    "FB": "forward and backward",
    "FBU": "forward, backward and update",
    "U": "update",
}
"""What people call each kind, in the order of legends."""

FILLS: dict[SpanKind, tuple[str, str]] = {
    # Every kind has its own range of brightness, from F (dark) over I and B to W (light), so that
    # they differ in black and white, too.
    "F": ("#17396b", "#27589a"),
    "B": ("#ec9840", "#f6b774"),
    "I": ("#228c83", "#3fa79d"),
    "W": ("#d8e8a0", "#f0f7d4"),
    "FB": ("#6b53a0", "#9d8aca"),
    "FBU": ("#6b53a0", "#9d8aca"),
    "U": ("#b00020", "#b00020"),
}
"""The fill of even and of odd microbatches, by kind."""

HATCHES: dict[SpanKind, str] = {"FB": "//", "FBU": "xx"}
"""What is drawn over the fill of those kinds that are several in one."""

TRANSFER_NAMES: dict[TransferKind, str] = {
    "F": "activations sent",
    "B": "cotangents sent",
    "R": "gradients all-reduced",
}
"""What people call what travels, in the order of legends."""

TRANSFER_FILLS: dict[TransferKind, str] = {"F": "#7fa9df", "B": "#a85510", "R": "#303030"}
"""The colour of what travels, by kind."""


class TimeUnit(NamedTuple):
    """A unit of a time axis.

    Attributes:
        name: its name in full.
        symbol: what is written behind a number.
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
    """What was run, how long it took, and how much of that was waiting."""
    took = format_seconds(timeline.makespan_s)
    return f"{timeline.title}: makespan {took}, bubble {timeline.bubble_share:.1%}"


def check_suffix(path: str | PathLike[str], expected: Sequence[str]) -> None:
    """Raises ValueError if the name of a file does not end as one of those expected."""
    if Path(path).suffix.lower() not in expected:
        raise ValueError(
            f"{path} ends in {Path(path).suffix or 'nothing'!r}; expected {' or '.join(expected)}: "
            "give the file such a name."
        )
