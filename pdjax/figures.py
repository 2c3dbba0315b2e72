"""Pictures for people: drawn with matplotlib, without a display."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pdjax.timeline import Span, SpanKind, Timeline

_FILL: dict[SpanKind, tuple[str, str]] = {
    # dark and light, for even and odd microbatches; they differ in black and white, too
    "F": ("#3b6fb6", "#9dbde6"),
    "B": ("#c4622d", "#efb58f"),
    "FB": ("#6b5b95", "#b9aed2"),
    "U": ("#2e7d32", "#2e7d32"),
    "FBU": ("#6b5b95", "#b9aed2"),
}
_NAMES: dict[SpanKind, str] = {
    "F": "forward",
    "B": "backward",
    "FB": "forward and backward",
    "U": "update",
    "FBU": "forward, backward and update",
}


def save_timeline(timeline: Timeline, path: str | Path) -> None:
    """Draws a timeline as a PNG or SVG file: a row for each worker, time along the other axis."""
    height = 1.6 + 0.6 * timeline.num_workers
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for span in timeline.spans:
        _draw_span(axes, span, timeline.makespan_s)
    axes.set_xlim(0, timeline.makespan_s * 1e3)
    axes.set_ylim(timeline.num_workers - 0.5, -0.5)
    axes.set_yticks(range(timeline.num_workers))
    axes.set_yticklabels([f"worker {worker}" for worker in range(timeline.num_workers)])
    axes.set_xlabel("milliseconds")
    axes.set_title(f"{timeline.title}   ({timeline.idle_share:.0%} idle)")
    present = {span.kind for span in timeline.spans}
    patches = [
        Patch(facecolor=_FILL[kind][0], edgecolor="black", label=_NAMES[kind])
        for kind in _FILL
        if kind in present
    ]
    axes.legend(
        handles=patches, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.22), frameon=False
    )
    figure.savefig(path, dpi=130)


def _draw_span(axes: Axes, span: Span, makespan_s: float) -> None:
    color = _FILL[span.kind][span.microbatch % 2]
    axes.barh(
        span.worker,
        span.duration_s * 1e3,
        left=span.start_s * 1e3,
        height=0.8 if span.kind != "U" else 0.5,
        color=color,
        edgecolor="black",
        linewidth=0.4,
    )
    label = str(span.microbatch)
    if span.kind != "U" and span.duration_s > makespan_s * len(label) / 90:
        middle = (span.start_s + span.end_s) / 2 * 1e3
        dark = span.microbatch % 2 == 0
        axes.text(
            middle,
            span.worker,
            label,
            ha="center",
            va="center",
            fontsize=9,
            color="white" if dark else "black",
        )
