"""How long the planner itself takes.

    python experiments/planner/speed.py
    python experiments/planner/speed.py --quick

Plans random models of 100 to 2,000 layers for one to 128 workers, with unlimited memory and with
memory that binds: 0.7 of what the best plan without a limit would need on its worst-off worker
(more, in steps, where nothing fits). Times are of `plan_pipeline`, with the other ways to train
that it reports beside the plan. Prints a table in Markdown and draws speed.png.

With `--quick`, one model of each of the cases that have a goal, beside the goal, in both forms:
with the all-reduce added, which is the default, and with it overlapped. Seconds there are of the
processor, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pdjax.plan import PlanOptions
from pdjax.plan.planner import make_case
from pdjax.plan.search import fastest, fits
from pdjax.profile.profile import LayerProfile, Profile
from pdjax.simulate import plan_pipeline
from pdjax.topology.topology import Topology

TOPOLOGIES = (
    "4@10GB/s",
    "4x4@10GB/s,1.25GB/s",
    "8x8@100GB/s,3.125GB/s",
    "16x8@100GB/s,3.125GB/s",
)
SIZES = (100, 300, 1000, 2000)
_KINDS = ("unlimited", "binding")
_COLORS = ("#3b6fb6", "#c4622d", "#2e7d32", "#6b5b95")


@dataclass(frozen=True)
class Case:
    """What is planned: layers, machines as text without memory, and the kind of memory."""

    num_layers: int
    topology: str
    memory: str

    @property
    def shape(self) -> str:
        return self.topology.partition("@")[0]

    @property
    def num_workers(self) -> int:
        return Topology.parse(self.topology).num_workers


@dataclass(frozen=True)
class Goal:
    """A case, and how many seconds it may take.

    Attributes:
        case: what is planned.
        most_s: seconds.
        num_stages: a fixed number of stages; None for any.
        memory: of each worker, as text; empty for what the case says.
    """

    case: Case
    most_s: float
    num_stages: int | None = None
    memory: str = ""


_MANY_WORKERS = "64x16@100GB/s,3.125GB/s"
GOALS = (
    Goal(Case(1000, TOPOLOGIES[1], "unlimited"), 0.3),
    Goal(Case(1000, TOPOLOGIES[1], "binding"), 0.9),
    Goal(Case(1000, TOPOLOGIES[3], "unlimited"), 3.0),
    Goal(Case(300, TOPOLOGIES[2], "2 GiB"), 10.0, memory=":2GiB"),
    Goal(Case(300, TOPOLOGIES[2], "2 GiB"), 10.0, num_stages=20, memory=":2GiB"),
    Goal(Case(1000, _MANY_WORKERS, "unlimited"), 30.0),
)

Times = dict[Case, list[float]]
"""Seconds of each repeat; none where a smaller case already took too long."""


def random_profile(num_layers: int, seed: int) -> Profile:
    """Layers whose sizes drift as in a convolutional network, no two cuts equally wide.

    Activations become narrower and weights larger towards the end; both passes of all layers take
    half a second together however many layers there are.
    """
    rng = np.random.default_rng(seed)
    along = np.linspace(0, 1, num_layers)
    work = rng.lognormal(0.0, 0.8, num_layers)
    work *= 0.5 / work.sum()
    width = 2e8 * np.exp(-4 * along + rng.normal(0, 0.7, num_layers))
    params = rng.lognormal(0.0, 1.0, num_layers) * np.exp(2 * along)
    params *= 1e9 / params.sum()
    stash = width * rng.uniform(1, 3, num_layers) * 50 / num_layers
    rows = zip(work, width, params, stash, strict=True)
    return Profile(
        tuple(
            LayerProfile(f"layer_{at}", s / 3, 2 * s / 3, float(w), float(p), float(b))
            for at, (s, w, p, b) in enumerate(rows)
        )
    )


def limited(profile: Profile, topology: Topology) -> Topology:
    """The machines with memory that the best plan without a limit exceeds."""
    costs = make_case(profile, topology, PlanOptions()).costs
    free = fastest(costs)
    assert free is not None, "without limits one worker can hold everything"
    size = 0.7 * max(map(costs.stage_bytes, costs.stages(free)))
    while True:
        found = replace(topology, memory_bytes=(int(size),) * topology.num_workers)
        if fits(costs.changed(topology=found)):
            return found
        size *= 1.1


def time_case(case: Case, repeats: int, most_s: float) -> list[float]:
    """Seconds of planning some models; fewer of them where that takes longer than `most_s`."""
    found: list[float] = []
    for seed in range(repeats):
        profile, topology = random_profile(case.num_layers, seed), Topology.parse(case.topology)
        if case.memory == "binding":
            topology = limited(profile, topology)
        start = time.perf_counter()
        plan_pipeline(profile, topology)
        found.append(time.perf_counter() - start)
        if sum(found) > most_s:
            break
    return found


def measure(sizes: tuple[int, ...], repeats: int, most_s: float) -> Times:
    times: Times = {}
    for memory in _KINDS:
        for topology in TOPOLOGIES:
            slowest = 0.0
            for size in sizes:
                case = Case(size, topology, memory)
                times[case] = [] if slowest > most_s else time_case(case, repeats, most_s)
                slowest = max([slowest, *times[case]])
                print(case.num_layers, case.shape, memory, cell(times[case]), file=sys.stderr)
    return times


def check_goals(goals: tuple[Goal, ...]) -> None:
    """Prints the seconds of each goal's case as soon as it is planned."""
    print("| workers | layers | memory | stages | added, s | overlapped, s | goal, s | |")
    print("|---|---:|---|---|---:|---:|---:|---|")
    for goal in goals:
        case = goal.case
        profile = random_profile(case.num_layers, 0)
        topology = Topology.parse(case.topology + goal.memory)
        if case.memory == "binding":
            topology = limited(profile, topology)
        seconds = []
        for overlap in (False, True):
            start = time.process_time()
            plan_pipeline(
                profile, topology, PlanOptions(num_stages=goal.num_stages, overlap=overlap)
            )
            seconds.append(time.process_time() - start)
        met = "met" if max(seconds) <= goal.most_s else "MISSED"
        print(
            f"| {case.shape} | {case.num_layers:,} | {case.memory} | {goal.num_stages or 'any'} | "
            f"{seconds[0]:.2g} | {seconds[1]:.2g} | {goal.most_s:g} | {met} |",
            flush=True,
        )


def cell(seconds: list[float]) -> str:
    if not seconds:
        return "—"
    spread = f" ({min(seconds):.2g}–{max(seconds):.2g})" if len(seconds) > 1 else ""
    return f"{statistics.median(seconds):.2g}{spread}"


def show(times: Times) -> None:
    sizes = sorted({case.num_layers for case in times})
    print(f"| workers | memory | {' | '.join(f'{size:,} layers' for size in sizes)} |")
    print("|---|---|" + "---:|" * len(sizes))
    for case in times:
        if case.num_layers == sizes[0]:
            row = (cell(times[replace(case, num_layers=size)]) for size in sizes)
            print(f"| {case.shape} | {case.memory} | {' | '.join(row)} |")


def draw(times: Times, path: Path) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    shapes = list(dict.fromkeys(case.shape for case in times))
    sizes = sorted({case.num_layers for case in times})
    for memory, style in zip(_KINDS, ("-", "--"), strict=True):
        for shape, color in zip(shapes, _COLORS, strict=False):
            mine = [c for c in times if (c.shape, c.memory) == (shape, memory)]
            _line(left, times, mine, "num_layers", f"{shape}, {memory}", color + style)
        for size, color in zip(sizes, _COLORS, strict=False):
            mine = [c for c in times if (c.num_layers, c.memory) == (size, memory)]
            _line(right, times, mine, "num_workers", f"{size:,} layers, {memory}", color + style)
    left.set_ylabel("seconds")
    for axes, label in ((left, "layers"), (right, "workers")):
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.14))
    figure.savefig(path, dpi=110)


def _line(axes: Axes, times: Times, cases: list[Case], along: str, label: str, look: str) -> None:
    points = list(_points(times, cases, along))
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o", markersize=3, label=label, color=look[:7], linestyle=look[7:])


def _points(times: Times, cases: list[Case], along: str) -> Iterator[tuple[int, float]]:
    for case in cases:
        if times[case]:
            yield getattr(case, along), statistics.median(times[case])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=3, help="random models of each size")
    parser.add_argument("--most", type=float, default=60, help="seconds after which to stop a row")
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_name("speed.png"))
    parser.add_argument("--quick", action="store_true", help="only the cases that have a goal")
    args = parser.parse_args()
    if args.quick:
        check_goals(GOALS)
        return
    times = measure(tuple(args.layers), args.repeats, args.most)
    show(times)
    draw(times, args.picture)


if __name__ == "__main__":
    sys.exit(main())
