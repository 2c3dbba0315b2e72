"""`python -m pdjax.simulate`: what the schedules for a plan would take."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pdjax.cli import run_command
from pdjax.plan import Plan
from pdjax.profile.files import load_profile
from pdjax.schedules import Schedule
from pdjax.simulate import Comparison, compare
from pdjax.timeline.figure import save_timelines
from pdjax.timeline.memory_figure import save_memory
from pdjax.timeline.perfetto import save_trace
from pdjax.timeline.text import draw_timeline
from pdjax.timeline.timeline import Timeline
from pdjax.topology.topology import Topology

_WIDTH = 100  # characters of a drawing
_FILES = ("comparison.txt", "timelines.png", "memory.png", "trace.json")


@dataclass(frozen=True)
class SimulateConfig:
    """Simulates schedules for a plan, and compares what they take.

    Nothing is run: the figures are those of the profile, or those that the plan predicts for its
    stages. Give one --schedule to see its timeline, too.
    """

    plan: Path
    """The plan, as 'python -m pdjax.plan --output' wrote it."""

    profile: Path | None = None
    """The profile of the plan's layers. With it, schedules that need other stages than the plan has
    get stages that take about equally long; without it the model is taken to divide evenly."""

    schedule: tuple[str, ...] = ()
    """Which schedules: their names, or text files in the form that print(schedule) has. By default
    all by name: model_parallel, gpipe, one_f_one_b, interleaved, zero_bubble_h1, zero_bubble_v,
    pipedream, pipedream_vertical_sync, pipedream_2bw."""

    num_microbatches: int | None = None
    """Microbatches in a minibatch, of the size that the figures are for; by default as many as the
    plan was made for, or, if that was one, four for each worker. A schedule that divides
    minibatches otherwise (pipedream runs them whole) is taken to have microbatches that cost as
    much more."""

    topology: str | None = None
    """The machines, such as 4x4@10GB/s,1.25GB/s:16GiB; by default those that the plan was made
    for."""

    num_minibatches: int | None = None
    """Minibatches in the timelines; by default 1 of a schedule that is flushed, else enough to see
    it fill, run and drain."""

    optimizer_bytes_per_param_byte: float = 2.0
    """Size of the optimizer state: 2 for Adam, 1 for momentum, 0 for plain SGD."""

    out: Path | None = None
    """Directory for comparison.txt, timelines.png, memory.png and trace.json (which ui.perfetto.dev
    shows)."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for arguments that make no sense."""
    return run_command("pdjax.simulate", SimulateConfig, simulate_plan, arguments)


def simulate_plan(config: SimulateConfig, console: Console) -> Comparison:
    """Simulates as `config` says; writes the files that it names.

    Raises:
        ValueError: if the configuration makes no sense, or a schedule that it names cannot run;
            nothing is written then.
    """
    if config.out is not None and config.out.exists() and not config.out.is_dir():
        raise ValueError(f"--out {config.out} is a file; expected a directory.")
    if config.num_minibatches is not None and config.num_minibatches < 1:
        raise ValueError(f"--num-minibatches {config.num_minibatches}; expected at least 1.")
    comparison = compare(
        Plan.load(config.plan),
        None if config.profile is None else load_profile(config.profile),
        None if config.topology is None else Topology.parse(config.topology),
        num_microbatches=config.num_microbatches,
        schedules=[_find(name) for name in config.schedule] or None,
        optimizer_bytes_per_param_byte=config.optimizer_bytes_per_param_byte,
    )
    if comparison.left_out and (config.schedule or not comparison.outcomes):
        raise ValueError("{} cannot run: {}".format(*comparison.left_out[0]))
    console.print(f"{comparison}", markup=False)
    _show(comparison, config, console)
    return comparison


def _find(name: str) -> str | Schedule:
    """The name of an algorithm, or the schedule in a file."""
    return Schedule.load(name) if Path(name).suffix or Path(name).is_file() else name


def _show(comparison: Comparison, config: SimulateConfig, console: Console) -> None:
    """Draws the timelines that were asked for."""
    if len(comparison.outcomes) == 1:
        (timeline,) = _timelines(comparison, config)
        drawing = draw_timeline(timeline, _WIDTH, color=console.is_terminal)
        console.print()
        console.print(Text.from_ansi(drawing))
    if config.out is not None:
        timelines = _timelines(comparison, config)
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "comparison.txt").write_text(f"{comparison}\n")
        save_timelines(timelines, config.out / "timelines.png")
        save_memory(timelines, config.out / "memory.png")
        save_trace(timelines, config.out / "trace.json")
        console.print(f"wrote {', '.join(_FILES)} into {config.out}", markup=False)


def _timelines(comparison: Comparison, config: SimulateConfig) -> list[Timeline]:
    topology, count = comparison.topology, config.num_minibatches
    return [each.timeline(topology, count) for each in comparison.candidates]


if __name__ == "__main__":
    sys.exit(main())
