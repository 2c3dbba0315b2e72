"""Pictures for people: drawn with matplotlib, without a display."""

from __future__ import annotations

from itertools import pairwise
from os import PathLike
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pdjax.planner import Plan
from pdjax.planner.table import format_seconds
from pdjax.profile import Profile
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
    axes.set_title(f"{timeline.title}   ({timeline.bubble_share:.0%} bubble)")
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


_STAGES = ("#eef2f8", "#f8f1ea")  # behind even and odd stages
_MOST_BARS = 150  # layers for which two bars each can be told apart
_MOST_NAMES = 60  # layers whose names can be told apart along an axis


def save_plan(plan: Plan, profile: Profile, path: str | PathLike[str]) -> None:
    """Draws a plan as a PNG or SVG file: layers along one axis, time and bytes as bars.

    The stages are shaded in turns and named above; the bar at a cut is what crosses it.

    Args:
        plan: the stages.
        profile: the figures of the plan's layers.
        path: the file.

    Raises:
        ValueError: if the profile has other layers than the plan.
    """
    if profile.names != plan.layers:
        raise ValueError(
            f"the profile has {len(profile.layers)} layers, the plan {len(plan.layers)}, or they "
            "differ in their names; expected the profile that the plan was made from."
        )
    count = len(plan.layers)
    figure = Figure(figsize=(min(max(8.0, 0.22 * count), 24.0), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    times, sizes = figure.subplots(2, 1, sharex=True)
    _draw_times(times, profile)
    _draw_sizes(sizes, profile)
    for axes in (times, sizes):
        _shade_stages(axes, plan)
        axes.set_xlim(-0.5, count - 0.5)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _name_stages(times, plan)
    if count <= _MOST_NAMES:
        sizes.set_xticks(range(count), [_shortened(name) for name in plan.layers], rotation=90)
        sizes.tick_params(axis="x", labelsize=7)
    sizes.set_xlabel("layer")
    if plan.prediction is not None:
        figure.suptitle(_title(plan), fontsize=11)
    figure.savefig(path, dpi=130)


def _draw_times(axes: Axes, profile: Profile) -> None:
    at = range(len(profile.layers))
    forward = [second * 1e3 for second in profile.column("forward_s")]
    backward = [second * 1e3 for second in profile.column("backward_s")]
    axes.bar(at, forward, width=0.8, color=_FILL["F"][0], label="forward")
    axes.bar(at, backward, width=0.8, bottom=forward, color=_FILL["B"][0], label="backward")
    axes.set_ylabel("milliseconds")


def _draw_sizes(axes: Axes, profile: Profile) -> None:
    at = [float(number) for number in range(len(profile.layers))]
    rows = (("param_bytes", "weights", "#2e7d32"), ("cut_bytes", "sent if cut here", "#9c9c9c"))
    for shift, (field, label, color) in zip((-0.2, 0.2), rows, strict=True):
        mebibytes = [size / 2**20 for size in profile.column(field)]
        if len(at) > _MOST_BARS:  # two bars a layer would hide each other
            axes.plot(at, mebibytes, color=color, label=label, linewidth=1)
        else:
            axes.bar([x + shift for x in at], mebibytes, width=0.4, color=color, label=label)
    axes.set_ylabel("MiB")


def _shade_stages(axes: Axes, plan: Plan) -> None:
    bounds = [*plan.first_layers, len(plan.layers)]
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        axes.axvspan(start - 0.5, stop - 0.5, color=_STAGES[stage % 2], zorder=0, linewidth=0)
        if stage:
            axes.axvline(start - 0.5, color="black", linewidth=1.2)


def _name_stages(axes: Axes, plan: Plan) -> None:
    """A label above each stage that is wide enough for it."""
    bounds = [*plan.first_layers, len(plan.layers)]
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        replicas = f" ×{plan.replicas[stage]}" if plan.replicas[stage] > 1 else ""
        share = f"\n{plan.shares[stage]:.0%}" if plan.shares else ""
        wide = (stop - start) / len(plan.layers) > 0.05
        label = f"stage {stage}{replicas}{share}" if wide else f"{stage}{replicas}"
        axes.text(
            (start + stop - 1) / 2,
            1.01,
            label,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
        )


def _shortened(name: str) -> str:
    """The end of a long name, in which neighbours differ."""
    return name if len(name) <= 28 else f"…{name[-27:]}"


def _title(plan: Plan) -> str:
    prediction = plan.prediction
    assert prediction is not None
    return (
        f"{plan.notation} on {prediction.topology}, {prediction.schedule}: "
        f"{format_seconds(prediction.minibatch_s)} a minibatch predicted"
    )


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
