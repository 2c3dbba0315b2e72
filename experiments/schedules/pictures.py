"""Draws the pictures of the guide, and prints its tables.

    python experiments/schedules/pictures.py

Everything is simulated: it takes some seconds, runs no model, and is the same every time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import tables
from cases import CUT_BYTES, MIB, NUM_MICROBATCHES, NUM_WORKERS, Case, links
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pdjax.schedules import ALGORITHMS, Schedule, forward_only, pipedream
from pdjax.schedules.action import FORWARD, LETTERS
from pdjax.schedules.columns import Columns
from pdjax.schedules.versions import delay_of, versions_read
from pdjax.schedules.weight_rule import STASH, WeightRule
from pdjax.simulate import StageCost, simulate, steady_s
from pdjax.timeline.axes import save_figure
from pdjax.timeline.figure import save_timelines, timelines_figure
from pdjax.timeline.memory_figure import memory_figure
from pdjax.timeline.style import headline
from pdjax.timeline.timeline import Timeline

_COLORS = {
    "gpipe": "#c44e52",
    "one_f_one_b": "#17396b",
    "interleaved": "#8172b3",
    "zero_bubble_h1": "#228c83",
    "zero_bubble_v": "#5a9a3c",
    "pipedream": "#ec9840",
    "pipedream_vertical_sync": "#a87232",
    "pipedream_2bw": "#b8860b",
}
_BELOW = ("pipedream_2bw", "pipedream_vertical_sync")  # where their names stand

STOP_MS = 36
"""Where the time axis of a picture of one schedule ends."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where they go")
    out = parser.parse_args().out
    for name, draw in PICTURES.items():
        draw(out / f"{name}.png")
    tables.main()


# -------- one schedule


def draw_minibatch(name: str, path: Path) -> None:
    """One minibatch, from its first action to its last."""
    draw_alone(Case.of(name).timeline(), path)


def draw_beginning(name: str, path: Path) -> None:
    """The first milliseconds of a run that goes on."""
    timeline = beginning(Case.of(name), STOP_MS)
    title = f"{name}, the first {STOP_MS} ms: bubble {timeline.bubble_share:.1%}"
    draw_alone(timeline, path, title)


def draw_alone(timeline: Timeline, path: Path, title: str = "") -> None:
    """One timeline, over the same time axis as all others that are drawn alone."""
    timeline = replace(timeline, transfers=())  # they take no time, and need no lanes
    figure = timelines_figure([timeline])
    (axes,) = figure.axes
    axes.set_xlim(0, STOP_MS * 1.002e-3)
    axes.set_title(title or headline(timeline), loc="left", size=11)
    save_figure(figure, path)


def draw_two_buffers(path: Path) -> None:
    """Twice the same: with the numbers of microbatches, and with those of versions."""
    case = Case.of("pipedream_2bw", NUM_WORKERS)
    timeline = beginning(case, STOP_MS)
    bubble = f"bubble {timeline.bubble_share:.1%}"
    titles = [
        f"{case.name}, minibatches of 4 microbatches, the first {STOP_MS} ms: {bubble}",
        "the same, with the number of the version of the weights that a pass reads",
    ]
    figure = timelines_figure([timeline, with_versions(case, timeline)])
    _name(figure, titles, "numbers of microbatches above, of versions below: even dark, odd light")
    save_figure(figure, path)


def draw_forward_only(path: Path) -> None:
    case = replace(Case.of("gpipe"), schedule=forward_only(NUM_WORKERS, NUM_MICROBATCHES))
    draw_alone(replace(case.timeline(), title="forward_only"), path)


# -------- several of them


def draw_overview(path: Path) -> None:
    """All schedules over the same time axis; dark and light are minibatches."""
    timelines, titles = [], []
    for name in ALGORITHMS:
        timeline = beginning(Case.of(name), 66)
        spans = [s._replace(microbatch=s.microbatch // NUM_MICROBATCHES) for s in timeline.spans]
        timelines.append(replace(timeline, spans=tuple(spans)))
        titles.append(f"{name}: bubble {timeline.bubble_share:.1%} of the first 66 ms")
    figure = timelines_figure(timelines)
    figure.set_size_inches(9, 16)
    _name(figure, titles, "minibatches of 8 microbatches: even dark, odd light")
    for axes in figure.axes:
        axes.tick_params(axis="y", labelsize=8.5)
        axes.tick_params(axis="x", labelbottom=True)
        for text in list(axes.texts):  # the numbers of minibatches
            text.remove()
    save_figure(figure, path)


def draw_versions(path: Path) -> None:
    """Which version of the weights each pass reads."""
    cases = [Case.of(name) for name in ("pipedream", "pipedream_vertical_sync")]
    figure = timelines_figure([with_versions(case, beginning(case, STOP_MS)) for case in cases])
    note = "the number of the version of the weights that a pass reads: even dark, odd light"
    _name(figure, [case.name for case in cases], note)
    save_figure(figure, path)


def draw_memory(path: Path) -> None:
    """Two minibatches each."""
    names = ("gpipe", "one_f_one_b", "zero_bubble_h1", "pipedream", "pipedream_2bw")
    figure = memory_figure([Case.of(name).timeline(times=2) for name in names])
    figure.set_size_inches(10, 11)
    save_figure(figure, path)


def draw_slow_links(path: Path) -> None:
    """A transfer takes as long as a forward pass."""
    cases = [
        Case.of("gpipe"),
        Case.of("one_f_one_b"),
        replace(Case.of("one_f_one_b", slack=1), name="one_f_one_b, slack=1"),
    ]
    save_timelines([case.timeline(topology=links(1e-3)) for case in cases], path)


def draw_replicas(path: Path) -> None:
    """Two replicas of a stage that takes twice as long as the other, with and without slack."""
    gradients = CUT_BYTES / 2
    costs = (
        StageCost(2e-3, 4e-3, gradient_bytes=gradients, sends=((1, CUT_BYTES),)),
        StageCost(1e-3, 2e-3, gradient_bytes=gradients, returns=((0, CUT_BYTES),)),
    )
    topology = links(1e-3, num_workers=3)
    timelines = []
    for slack in (0, 1):
        schedule = pipedream(2, replicas=(2, 1), slack=slack)
        each_ms = steady_s(schedule, costs, topology) * 1e3
        title = (
            f"pipedream, replicas=(2, 1), slack={slack}; {each_ms:.4g} ms a microbatch once full"
        )
        timelines.append(
            simulate(schedule, costs, topology, rule=STASH, num_minibatches=10, title=title)
        )
    save_timelines(timelines, path)


# -------- help


def beginning(case: Case, stop_ms: float) -> Timeline:
    """The first milliseconds of a run that goes on."""
    times = 2 + round(stop_ms * 1e-3 / case.alone_s)
    return case.timeline(times).window(0, stop_ms * 1e-3)


def with_versions(case: Case, timeline: Timeline) -> Timeline:
    """Spans with the number of the version that they read in the place of the microbatch."""
    versions = versions_of(case.schedule, case.rule)
    spans = [
        s._replace(microbatch=versions.get((s.kind, s.stage, s.microbatch), 0))
        for s in timeline.spans
    ]
    return replace(timeline, spans=tuple(spans))


def versions_of(schedule: Schedule, rule: WeightRule) -> dict[tuple[str, int, int], int]:
    """The version of the weights that a pass reads, by kind, stage and microbatch."""
    columns = schedule.unrolled(40)
    read = versions_read(columns, rule, schedule.num_microbatches, delay_of(rule, schedule))
    found = {}
    for at, forward, backward in zip(read.at, read.forward, read.backward, strict=True):
        kind, stage, microbatch = _action(columns, at)
        found[kind, stage, microbatch] = int(backward)
        found[FORWARD, stage, microbatch] = int(forward)
    return found


def _action(columns: Columns, at: int) -> tuple[str, int, int]:
    return LETTERS[columns.kind[at]], int(columns.stage[at]), int(columns.microbatch[at])


def _name(figure: Figure, titles: Sequence[str], note: str) -> None:
    """Gives the panels other titles, and the legend another first line."""
    for axes, title in zip(figure.axes, titles, strict=True):
        axes.set_title(title, loc="left", size=11)
    figure.legends[0].set_title(note)


# -------- the choice


def draw_choice(path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_trade(left)
    _draw_bubbles(right)
    figure.savefig(path, dpi=110)


def _draw_trade(axes: Axes) -> None:
    """Time against memory."""
    for name, color in _COLORS.items():
        case = Case.of(name)
        peak, time_ms = max(case.peak_bytes) / MIB, case.further_s() * 1e3
        fill = "white" if ALGORITHMS[name].stale else color
        axes.plot(peak, time_ms, "o", color=color, markerfacecolor=fill, markersize=9)
        to = (0, 9) if name not in _BELOW else (0, -17)
        axes.annotate(
            name, (peak, time_ms), to, textcoords="offset points", fontsize=9, ha="center"
        )
    axes.set_title("8 microbatches; hollow: stale weights", fontsize=10)
    axes.set(
        xlabel="weights and stash of the fullest worker, MiB", ylim=(22, 35.5), xlim=(180, 660)
    )
    axes.set_ylabel("ms for each further minibatch")
    axes.grid(alpha=0.3)


def _draw_bubbles(axes: Axes) -> None:
    """The bubble by the number of microbatches."""
    for name in ("gpipe", "interleaved", "zero_bubble_h1", "zero_bubble_v", "pipedream_2bw"):
        counts = range(NUM_WORKERS if ALGORITHMS[name].stale else 1, 33)
        cases = [Case.of(name, count) for count in counts]
        shares = [100 * case.bubble_of(case.further_s()) for case in cases]
        label = "gpipe, one_f_one_b" if name == "gpipe" else name
        dashes = "--" if ALGORITHMS[name].stale else "-"
        axes.plot(counts, shares, dashes, color=_COLORS[name], label=label, linewidth=2)
    axes.set_title("the same stages; dashed: stale weights", fontsize=10)
    axes.set(xlabel="microbatches in a minibatch", ylabel="bubble, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, frameon=False)


PICTURES: dict[str, Callable[[Path], None]] = {
    "overview": draw_overview,
    "choice": draw_choice,
    "model_parallel": partial(draw_beginning, "model_parallel"),
    "gpipe": partial(draw_minibatch, "gpipe"),
    "one_f_one_b": partial(draw_minibatch, "one_f_one_b"),
    "interleaved": partial(draw_minibatch, "interleaved"),
    "zero_bubble_h1": partial(draw_minibatch, "zero_bubble_h1"),
    "zero_bubble_v": partial(draw_minibatch, "zero_bubble_v"),
    "pipedream": partial(draw_beginning, "pipedream"),
    "pipedream_vertical_sync": draw_versions,
    "pipedream_2bw": draw_two_buffers,
    "forward_only": draw_forward_only,
    "replicas": draw_replicas,
    "memory": draw_memory,
    "slow_links": draw_slow_links,
}

if __name__ == "__main__":
    sys.exit(main())
