"""The frame of a picture in which every worker has a row, and time runs along the other axis.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.ticker import FuncFormatter

from pdjax.timeline.style import check_suffix, stages_by_worker, time_unit
from pdjax.timeline.timeline import Timeline

IDLE = "#f0f0f0"
"""The colour of the rows: where it shows, a worker has nothing."""

TOP, BOTTOM = -0.42, 0.42
"""The edges of a row, from its middle; the distance of two rows is 1."""


def rows_figure(
    timelines: Sequence[Timeline], width_in: float, row_in: float
) -> tuple[Figure, list[Axes]]:
    """An empty figure with a panel for each timeline, one above the other.

    Args:
        timelines: the timelines to draw in it.
        width_in: its width, in inches.
        row_in: the height of a row, in inches; less where there are many workers.

    Raises:
        ValueError: if there is no timeline.
    """
    if not timelines:
        raise ValueError("got no timelines; expected at least one to draw.")
    counts = [timeline.num_workers for timeline in timelines]
    height_in = min(row_in, max(14.0 / sum(counts), 0.16)) * sum(counts)
    height_in += 0.6 * len(timelines) + 0.9  # titles; time axis and legend
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    grid = figure.subplots(
        len(counts), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": counts}
    )
    panels = list(grid[:, 0])
    for axes, timeline in zip(panels, timelines, strict=True):
        _frame(axes, timeline)
    _label_time(panels[-1], max(timeline.makespan_s for timeline in timelines))
    return figure, panels


def _frame(axes: Axes, timeline: Timeline) -> None:
    """Names the rows, and shades them to the end of the timeline."""
    rows = range(timeline.num_workers)
    stages = stages_by_worker(timeline)
    plain = stages == [[worker] for worker in rows]
    names = [
        f"worker {worker}" if plain else f"worker {worker}\n{_stage_names(stages[worker])}"
        for worker in rows
    ]
    axes.set_yticks(rows, names, fontsize=9 if timeline.num_workers <= 32 else 6)
    axes.set_ylim(timeline.num_workers - 0.5, -0.5)
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    middles = [row + (TOP + BOTTOM) / 2 for row in rows]
    axes.barh(middles, timeline.makespan_s, height=BOTTOM - TOP, color=IDLE, zorder=0, gid="idle")


def _stage_names(stages: Sequence[int]) -> str:
    if len(stages) > 4:
        return f"stages {stages[0]}, {stages[1]}, … {stages[-1]}"
    return f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"


def _label_time(axes: Axes, stop_s: float) -> None:
    """The time axis in a unit in which the numbers are short."""
    unit = time_unit(stop_s)
    axes.set_xlim(0, (stop_s or 1.0) * 1.002)  # a line at the very end is seen, too
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit.size_s:.6g}"))
    axes.set_xlabel(unit.name)


def add_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], note: str) -> None:
    """A legend below all panels.

    Args:
        figure: where it stands.
        handles: patches, or tuples of patches that stand beside each other.
        labels: a text for each.
        note: a line above them.
    """
    widest_in = (max(map(len, labels), default=0) * 5 + 45) / 72  # points of text, and the patch
    most = max(1, int(figure.get_figwidth() / widest_in))
    lines = -(-len(labels) // most)
    figure.legend(
        list(handles),
        list(labels),
        title=note,
        title_fontsize=9,
        fontsize=9,
        loc="outside lower center",
        ncols=-(-len(labels) // max(lines, 1)),
        frameon=False,
        handlelength=3,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )


def save_figure(figure: Figure, path: str | PathLike[str]) -> None:
    """Writes a figure as a PNG or SVG file, the same bytes for the same figure.

    Raises:
        ValueError: if the suffix is another one.
    """
    check_suffix(path, (".png", ".svg"))
    svg = str(path).lower().endswith(".svg")
    with mpl.rc_context({"svg.hashsalt": "pdjax"}):
        figure.savefig(path, dpi=130, metadata={"Date": None} if svg else None)
