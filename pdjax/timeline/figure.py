"""Pictures of timelines, drawn with matplotlib, without a display.

A row for each worker, and under it a thin lane of what it sends; time along the other axis. The
stages of a worker that has several lie a little below each other, so that one sees which it runs.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from statistics import quantiles
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pdjax.timeline.axes import BOTTOM, TOP, add_legend, rows_figure, save_figure
from pdjax.timeline.style import (
    NAMES,
    STYLES,
    TRANSFER_STYLES,
    check_suffix,
    grey,
    headline,
    stages_by_worker,
)
from pdjax.timeline.timeline import Span, SpanKind, Timeline, TransferKind

_EDGE = "#202020"
_MARGIN_IN = 1.4  # beside the rows, together
_GLYPH = 0.64  # the width of a digit, in font sizes
_ROW_IN = 0.56
_LANES = 0.2  # the height of the lanes of transfers, of the distance of two rows

_Box = tuple[float, float, float, float]  # from and to in time, then in height


def save_timeline(timeline: Timeline, path: str | PathLike[str]) -> None:
    """Draws a timeline as a PNG or SVG file.

    Args:
        timeline: the timeline.
        path: the file; its suffix says the format.

    Raises:
        ValueError: if the suffix is another one.
    """
    save_timelines([timeline], path)


def save_timelines(timelines: Sequence[Timeline], path: str | PathLike[str]) -> None:
    """Draws timelines one above the other, with a common time axis, as a PNG or SVG file.

    Args:
        timelines: the timelines: a simulated and a measured one, or those of several schedules.
        path: the file; its suffix says the format.

    Raises:
        ValueError: if the suffix is another one, or there is no timeline.
    """
    check_suffix(path, (".png", ".svg"))  # before anything is drawn
    save_figure(timelines_figure(timelines), path)


def timelines_figure(timelines: Sequence[Timeline]) -> Figure:
    """The figure that `save_timelines` saves.

    Raises:
        ValueError: if there is no timeline.
    """
    scale = _Scale.of(timelines)
    figure, panels = rows_figure(timelines, scale.width_in, _ROW_IN)
    for axes, timeline in zip(panels, timelines, strict=True):
        _draw_spans(axes, timeline, scale)
        _draw_transfers(axes, timeline)
        axes.set_title(headline(timeline), loc="left", fontsize=11)
    _add_legend(figure, timelines)
    return figure


@dataclass(frozen=True)
class _Scale:
    """How large things are.

    Attributes:
        width_in: the figure's width, in inches.
        points_per_s: the room that a second has, in points.
        font_size: of the numbers in boxes, in points.
    """

    width_in: float
    points_per_s: float
    font_size: float

    @classmethod
    def of(cls, timelines: Sequence[Timeline]) -> _Scale:
        """As wide as the numbers of most boxes need, within what a screen or a page shows."""
        stop_s = max((timeline.makespan_s for timeline in timelines), default=0.0) or 1.0
        wide = [s for t in timelines for s in t.spans if not STYLES[s.kind].mark]
        spans = [span for span in wide if span.duration_s > 0]
        lengths_s = [span.duration_s for span in spans]
        narrow_s = quantiles(lengths_s, n=5)[0] if len(spans) > 1 else stop_s
        digits = max((len(str(span.microbatch)) for span in spans), default=1)
        needed_in = stop_s / narrow_s * (7 * _GLYPH * digits + 2) / 72
        width_in = min(max(9.0, needed_in + _MARGIN_IN), 24.0)
        points_per_s = (width_in - _MARGIN_IN) * 72 / stop_s
        font_size = (narrow_s * points_per_s - 2) / (_GLYPH * digits)
        return cls(width_in, points_per_s, min(max(font_size, 5.0), 9.0))

    def fits(self, text: str, duration_s: float) -> bool:
        """Whether a text has room in a box."""
        return len(text) * _GLYPH * self.font_size + 1 <= duration_s * self.points_per_s

    def edge(self, boxes: Sequence[_Box]) -> float:
        """The width of the boxes' edges, in points: they must not hide narrow boxes."""
        narrow = min(stop - start for start, stop, _, _ in boxes) * self.points_per_s
        return 0.5 if narrow > 4 else 0.25 if narrow > 2 else 0.0


def _draw_spans(axes: Axes, timeline: Timeline, scale: _Scale) -> None:
    stages = stages_by_worker(timeline)
    bottom = BOTTOM - (_LANES if timeline.transfers else 0.0)
    boxes: defaultdict[tuple[SpanKind, int], list[_Box]] = defaultdict(list)
    for span in timeline.spans:
        low, high = _extent(stages[span.worker], span.stage, bottom)
        box = (span.start_s, span.end_s, span.worker + low, span.worker + high)
        boxes[span.kind, span.microbatch % 2].append(box)
        _draw_label(axes, span, (box[2] + box[3]) / 2, scale)
    for (kind, parity), those in boxes.items():
        style = STYLES[kind]
        fill = style.fills[parity]
        _draw_boxes(
            axes,
            those,
            facecolor=fill,
            # an edge of this width is all that is seen of an update that takes no time
            edgecolor=fill if style.mark else _EDGE,
            linewidth=1.4 if style.mark else scale.edge(those),
            zorder=4 if style.mark else 2,
            gid=f"{kind}{parity}",
        )
        if style.hatch:  # by itself: a hatch has the colour of the edge, too dark for numbers
            _draw_boxes(
                axes,
                those,
                facecolor="none",
                edgecolor=style.fills[1 - parity],
                linewidth=0,
                hatch=style.hatch,
                zorder=3,
            )


def _extent(stages: Sequence[int], stage: int, bottom: float) -> tuple[float, float]:
    """Where in its row a box lies: the first stage of a worker at the top, the last below."""
    if len(stages) == 1:
        return TOP, bottom
    height = 2 * (bottom - TOP) / (len(stages) + 1)
    low = TOP + (bottom - TOP - height) * stages.index(stage) / (len(stages) - 1)
    return low, low + height


def _draw_boxes(axes: Axes, boxes: Sequence[_Box], **style: Any) -> None:
    """One collection for all of them: a patch for each would take seconds."""
    corners = [
        ((start, low), (stop, low), (stop, high), (start, high)) for start, stop, low, high in boxes
    ]
    axes.add_collection(PolyCollection(corners, **style), autolim=False)


def _draw_label(axes: Axes, span: Span, middle: float, scale: _Scale) -> None:
    text, style = str(span.microbatch), STYLES[span.kind]
    if style.mark or not scale.fits(text, span.duration_s):
        return
    label = axes.text(
        (span.start_s + span.end_s) / 2,
        middle,
        text,
        ha="center",
        va="center_baseline",
        fontsize=scale.font_size,
        color="white" if grey(style.fills[span.microbatch % 2]) < 0.5 else "black",
        zorder=5,
        clip_on=True,
    )
    label.set_in_layout(False)  # to measure thousands of them takes seconds


def _draw_transfers(axes: Axes, timeline: Timeline) -> None:
    """A lane for each kind, below the worker that sends."""
    present = _transfer_kinds([timeline])
    boxes: defaultdict[TransferKind, list[_Box]] = defaultdict(list)
    for transfer in timeline.transfers:
        height = _LANES / len(present)
        low = transfer.source + BOTTOM - _LANES + height * present.index(transfer.kind)
        boxes[transfer.kind].append((transfer.start_s, transfer.end_s, low, low + height))
    for kind, those in boxes.items():
        color = TRANSFER_STYLES[kind].fill
        _draw_boxes(
            axes, those, facecolor=color, edgecolor=color, linewidth=0.3, gid=f"sent-{kind}"
        )


def _transfer_kinds(timelines: Sequence[Timeline]) -> list[TransferKind]:
    present = {transfer.kind for timeline in timelines for transfer in timeline.transfers}
    return [kind for kind in TRANSFER_STYLES if kind in present]


def _add_legend(figure: Figure, timelines: Sequence[Timeline]) -> None:
    present = {span.kind for timeline in timelines for span in timeline.spans}
    kinds: list[SpanKind] = [kind for kind in NAMES if kind in present]
    sent = _transfer_kinds(timelines)
    handles: list[Any] = [tuple(_legend_patch(kind, parity) for parity in (0, 1)) for kind in kinds]
    handles += [Patch(facecolor=TRANSFER_STYLES[kind].fill) for kind in sent]
    labels = [NAMES[kind] for kind in kinds] + [TRANSFER_STYLES[kind].name for kind in sent]
    note = "microbatches by number: even dark, odd light"
    if any(len(stages) > 1 for t in timelines for stages in stages_by_worker(t)):
        note += "; the stages of a worker from the top of its row to the bottom"
    add_legend(figure, handles, labels, note)


def _legend_patch(kind: SpanKind, parity: int) -> Patch:
    style = STYLES[kind]
    if style.hatch:
        edge = style.fills[1 - parity]
        return Patch(facecolor=style.fills[parity], edgecolor=edge, hatch=style.hatch * 2)
    return Patch(facecolor=style.fills[parity], edgecolor=_EDGE, linewidth=0.5)
