"""Pictures of the bytes that workers hold over time, drawn with matplotlib, without a display.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pdjax.timeline.axes import BOTTOM, TOP, add_legend, rows_figure, save_figure
from pdjax.timeline.style import check_suffix
from pdjax.timeline.timeline import Timeline
from pdjax.units import format_bytes

_WIDTH_IN = 11.0
_ROW_IN = 0.62
_VERSIONS = "#44546a"
_STASH = "#e3a857"


def save_memory(timelines: Sequence[Timeline], path: str | PathLike[str]) -> None:
    """Draws the bytes that each worker holds over time as a PNG or SVG file.

    A panel for each timeline and in it a row for each worker: at the bottom the versions of the
    weights, the activations that wait for a backward pass on top of them. All rows have the same
    scale, so that workers and timelines can be compared; beside a row stands its peak.

    Args:
        timelines: the timelines.
        path: the file; its suffix says the format.

    Raises:
        ValueError: if the suffix is another one, there is no timeline, or one of them does not say
            what was held.
    """
    check_suffix(path, (".png", ".svg"))  # before anything is drawn
    save_figure(memory_figure(timelines), path)


def memory_figure(timelines: Sequence[Timeline]) -> Figure:
    """The figure that `save_memory` saves.

    Raises:
        ValueError: if there is no timeline, or one of them does not say what was held.
    """
    for timeline in timelines:
        if not timeline.memory:
            raise ValueError(
                f"the timeline {timeline.title!r} does not say what the workers held; expected "
                "entries in its `memory`, which simulated timelines have."
            )
    figure, panels = rows_figure(timelines, _WIDTH_IN, _ROW_IN)
    peaks = [[t.peak_bytes(worker) for worker in range(t.num_workers)] for t in timelines]
    most = max(max(row) for row in peaks) or 1
    for axes, timeline, row in zip(panels, timelines, peaks, strict=True):
        for worker, peak in enumerate(row):
            _draw_worker(axes, timeline, worker, most)
            _name_peak(axes, worker, peak)
        axes.set_title(f"{timeline.title}: at most {format_bytes(max(row))}", loc="left", size=11)
    handles = [Patch(facecolor=_VERSIONS), Patch(facecolor=_STASH)]
    labels = ["versions of the weights", "stash: activations that wait for a backward pass"]
    note = f"the height of a row is {format_bytes(most)}; beside it the peak"
    add_legend(figure, handles, labels, note)
    return figure


def _draw_worker(axes: Axes, timeline: Timeline, worker: int, most: int) -> None:
    # of the entries of one moment the last counts: freed and stashed at once is no change
    moments = {entry.time_s: entry for entry in timeline.memory if entry.worker == worker}
    if not moments:
        return
    held = list(moments.values())
    held.append(held[-1]._replace(time_s=max(timeline.makespan_s, held[-1].time_s)))
    times = [entry.time_s for entry in held]
    floor = worker + BOTTOM
    unit = (BOTTOM - TOP) / most
    weights = [floor - unit * entry.version_bytes for entry in held]
    totals = [above - unit * entry.stash_bytes for above, entry in zip(weights, held, strict=True)]
    axes.fill_between(times, floor, weights, step="post", color=_VERSIONS, linewidth=0)
    axes.fill_between(times, weights, totals, step="post", color=_STASH, linewidth=0)
    axes.step(times, totals, where="post", color="black", linewidth=0.8, gid=f"held-{worker}")


def _name_peak(axes: Axes, worker: int, peak: int) -> None:
    axes.annotate(
        format_bytes(peak),
        (1, worker),
        (4, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )
