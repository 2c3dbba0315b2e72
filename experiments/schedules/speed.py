"""How long schedules take to make, to validate and to simulate.

    python experiments/schedules/speed.py

Every algorithm on 64 workers with 1,024 microbatches (of those that are never flushed and run
minibatches whole, 1,024 minibatches), and on 4 to 1,024 workers with as many. All stages are
equal, the workers are on hosts of eight, so that workers share links. Validating and simulating
begin with a schedule of which nothing but the lists of actions is there. Times are of the
processor, as one thread does everything and others may be at work on the machine. Prints tables in
Markdown and draws growth.png.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pdjax.schedules import ALGORITHMS, Algorithm, Schedule, validate
from pdjax.simulate import StageCost, simulate
from pdjax.topology.topology import Level, Topology

_COLORS = ("#3b6fb6", "#c4622d", "#2e7d32", "#6b5b95", "#8c564b", "#d4a017", "#17a2b8", "#777777")
Made = TypeVar("Made")
_LARGE = 256  # workers, from which on one repeat is enough
STEPS = ("generate", "validate", "simulate")


@dataclass(frozen=True)
class Case:
    """An algorithm on some workers."""

    name: str
    num_workers: int
    count: int  # microbatches, or minibatches where these run whole

    @property
    def algorithm(self) -> Algorithm:
        return ALGORITHMS[self.name]

    @property
    def num_minibatches(self) -> int:
        return 1 if self.algorithm.divides else self.count

    def make(self) -> Schedule:
        stages = self.num_workers * self.algorithm.num_chunks
        return self.algorithm.make(stages, self.count if self.algorithm.divides else 1)


@dataclass(frozen=True)
class Times:
    """Seconds of each step, of every repeat; how many actions there were."""

    seconds: dict[str, list[float]]
    num_actions: int

    def median(self, step: str) -> float:
        return statistics.median(self.seconds[step])

    @property
    def total(self) -> float:
        return sum(self.median(step) for step in STEPS)


def costs_of(num_stages: int) -> list[StageCost]:
    """Equal stages: 1 ms forward, 2 ms backward, 1 MB to each neighbour."""
    return [
        StageCost(
            1e-3,
            2e-3,
            param_bytes=10**8,
            stash_bytes=10**7,
            held_bytes=10**7,
            sends=((stage + 1, 1e6),) if stage + 1 < num_stages else (),
            returns=((stage - 1, 1e6),) if stage else (),
        )
        for stage in range(num_stages)
    ]


def hosts_of_eight(num_workers: int) -> Topology:
    """50 GB/s inside a host, 12.5 GB/s between hosts."""
    inside = min(8, num_workers)
    return Topology((Level(inside, 5e10), Level(num_workers // inside, 1.25e10)))


def timed(action: Callable[[], Made]) -> tuple[Made, float]:
    gc.collect()
    start = time.process_time()
    made = action()
    return made, time.process_time() - start


def measure(case: Case, repeats: int) -> Times:
    found = [measure_once(case) for _ in range(repeats)]
    num_actions = len(case.make().unrolled(case.num_minibatches))
    return Times({step: [each[step] for each in found] for step in STEPS}, num_actions)


def measure_once(case: Case) -> dict[str, float]:
    rule, topology = case.algorithm.weight_rule, hosts_of_eight(case.num_workers)
    schedule, generating_s = timed(case.make)
    fresh = replace(schedule)  # nothing cached
    _, validating_s = timed(lambda: validate(fresh, rule))
    costs, another = costs_of(schedule.num_stages), replace(schedule)
    _, simulating_s = timed(
        lambda: simulate(another, costs, topology, rule=rule, num_minibatches=case.num_minibatches)
    )
    return dict(zip(STEPS, (generating_s, validating_s, simulating_s), strict=True))


def cell(seconds: list[float]) -> str:
    spread = f" ({min(seconds):.2g}–{max(seconds):.2g})" if len(seconds) > 1 else ""
    return f"{statistics.median(seconds):.2g}{spread}"


def show(times: dict[Case, Times]) -> None:
    print(f"| schedule | actions | {' | '.join(STEPS)} | together |")
    print("|---|---:|" + "---:|" * (len(STEPS) + 1))
    for case, found in times.items():
        cells = [cell(found.seconds[step]) for step in STEPS]
        print(f"| {case.name} | {found.num_actions:,} | {' | '.join(cells)} | {found.total:.2g} |")


def show_growth(times: dict[Case, Times]) -> None:
    sizes = sorted({case.num_workers for case in times})
    print(f"| schedule | {' | '.join(f'{size:,} workers' for size in sizes)} |")
    print("|---|" + "---:|" * len(sizes))
    for name in dict.fromkeys(case.name for case in times):
        row = {case.num_workers: found for case, found in times.items() if case.name == name}
        cells = (f"{row[size].total:.2g}" for size in sizes)
        print(f"| {name} | {' | '.join(cells)} |")


def draw(times: dict[Case, Times], path: Path) -> None:
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(STEPS), sharey=True)
    for axes, step in zip(panels, STEPS, strict=True):
        for name, color in zip(ALGORITHMS, (*_COLORS, "black"), strict=True):
            _line(axes, times, name, step, color)
        axes.set(xscale="log", yscale="log", xlabel="workers", title=step)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)


def _line(axes: Axes, times: dict[Case, Times], name: str, step: str, color: str) -> None:
    points = sorted((c.num_workers, t.median(step)) for c, t in times.items() if c.name == name)
    x, y = zip(*points, strict=True)
    axes.plot(x, y, marker="o", markersize=3, label=name, color=color)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--microbatches", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--schedules", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_name("growth.png"))
    args = parser.parse_args()
    main_size, growth = {}, {}
    for name in args.schedules:
        case = Case(name, 64, args.microbatches)
        main_size[case] = measure(case, args.repeats)
        for size in args.workers:
            case = Case(name, size, args.microbatches)
            growth[case] = measure(case, args.repeats if size < _LARGE else 1)
            print(case, f"{growth[case].total:.3g} s", file=sys.stderr)
    show(main_size)
    print()
    show_growth(growth)
    if set(args.schedules) == set(ALGORITHMS):
        draw(growth, args.picture)


if __name__ == "__main__":
    sys.exit(main())
