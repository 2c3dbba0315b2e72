"""Pictures of plans, drawn with matplotlib, without a display."""

from __future__ import annotations

from itertools import pairwise
from os import PathLike

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pdjax.plan import Plan
from pdjax.profile.profile import Profile
from pdjax.timeline.style import STYLES
from pdjax.units import format_seconds

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
    axes.bar(at, forward, width=0.8, color=STYLES["F"].fills[1], label="forward")
    axes.bar(at, backward, width=0.8, bottom=forward, color=STYLES["B"].fills[0], label="backward")
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
