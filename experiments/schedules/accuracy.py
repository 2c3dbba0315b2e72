"""How well the simulator predicts the time of schedules.

    python experiments/schedules/accuracy.py

Every program runs in one thread. The layers are profiled, every schedule is simulated with these
figures, and all pipelines train in turns, some steps each, for several rounds. In each round it is
measured, too, how much slower two devices of one process are if both compute at once. Prints a
table in Markdown, and draws accuracy.png and overlay.png.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 "
    + os.environ.get("XLA_FLAGS", "")
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from slowdown import make_chain, seconds

import pdjax
from pdjax.simulate import steady_s
from pdjax.timeline.figure import save_timelines

CHAIN = 40  # calls one after the other on a device
POINTS = [
    # schedule, workers, microbatches
    ("model_parallel", 2, 4),
    ("gpipe", 2, 4),
    ("gpipe", 2, 8),
    ("one_f_one_b", 2, 2),
    ("one_f_one_b", 2, 8),
    ("interleaved", 2, 8),
    ("zero_bubble_h1", 2, 8),
    ("zero_bubble_v", 2, 8),
    ("pipedream", 2, 1),
    ("pipedream_2bw", 2, 8),
    ("gpipe", 4, 8),
    ("one_f_one_b", 4, 8),
    ("zero_bubble_h1", 4, 8),
    ("pipedream", 4, 1),
]


@dataclass
class Point:
    """One pipeline: its simulation, and the seconds of every measured step."""

    schedule: str
    workers: int
    microbatches: int
    pipe: pdjax.Pipeline
    state: Any
    batch: Any
    simulated_s: float = 0.0
    shared_s: float = 0.0
    measured_s: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Such as ``gpipe 2x4``."""
        return f"{self.schedule} {self.workers}x{self.microbatches}"


def loss_fn(params: Any, batch: Any) -> Any:
    """A stack of residual blocks."""
    x = batch["x"]
    for name in sorted(params):
        block = params[name]
        x = x + jnp.tanh(x @ block["up"]) @ block["down"]
    return jnp.mean((x - batch["y"]) ** 2)


def make_params(blocks: int, width: int) -> Any:
    """Parameters of `loss_fn`."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.normal(size=(rows, columns)) / rows**0.5).astype(np.float32)

    return {
        f"block_{at:02}": {"up": matrix(width, 2 * width), "down": matrix(2 * width, width)}
        for at in range(blocks)
    }


def make_batch(size: int, width: int) -> Any:
    """A minibatch for `loss_fn`."""
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=(size, width)).astype(np.float32) for name in ("x", "y")}


def make_point(schedule: str, workers: int, microbatches: int, options: Any) -> Point:
    """A pipeline with equal stages; a microbatch has the same size at every point."""
    algorithm = pdjax.ALGORITHMS[schedule]
    batch = make_batch(options.microbatch * microbatches, options.width)
    pipe = pdjax.Pipeline(
        loss_fn,
        optax.sgd(1e-3),
        schedule=schedule,
        num_stages=workers * algorithm.num_chunks,
        num_microbatches=microbatches,
        devices=jax.devices()[:workers],
        plan="balanced",
    )
    state = pipe.init(make_params(options.blocks, options.width), batch)
    return Point(schedule, workers, microbatches, pipe, state, batch)


def simulate(point: Point, profile: pdjax.Profile, slowdown: float) -> None:
    """Predicts the seconds of a step, and the least that one process allows.

    Where two devices that compute at once are `slowdown` times slower, all devices together do no
    more than 2 / `slowdown` seconds of work in a second.
    """
    prepared = point.pipe._last_training().prepared
    costs = prepared.stage_costs(profile)
    point.simulated_s = steady_s(point.pipe.schedule, costs)
    work = point.microbatches * sum(cost.forward_s + cost.backward_s for cost in costs)
    point.shared_s = max(point.simulated_s, work * slowdown / 2)


def two_at_once(width: int, size: int) -> float:
    """How many times longer two devices take for a chain of calls each than one device for one."""
    chains = [make_chain(device, width, size) for device in jax.devices()[:2]]
    seconds(chains, CHAIN)
    alone = [seconds(chains[:1], CHAIN) for _ in range(5)]
    together = [seconds(chains, CHAIN) for _ in range(5)]
    return float(np.median(together) / np.median(alone))


def measure(point: Point, steps: int) -> None:
    """Seconds of a step, in the mean over some; whatever was in flight is waited for before."""
    jax.block_until_ready([held.lasting.weights for held in point.state.run.stages])
    start = time.perf_counter()
    for _ in range(steps):
        point.state, _ = point.pipe.step(point.state, point.batch)
    jax.block_until_ready([held.lasting.weights for held in point.state.run.stages])
    point.measured_s.append((time.perf_counter() - start) / steps)


def table(points: list[Point]) -> str:
    """Simulated beside measured."""
    rows = [
        "| schedule | workers | microbatches | simulated | measured (quartiles) | measured / "
        "simulated | … with both devices slowed |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points:
        low, middle, high = np.percentile(point.measured_s, [25, 50, 75]) * 1e3
        rows.append(
            f"| {point.schedule} | {point.workers} | {point.microbatches} "
            f"| {point.simulated_s * 1e3:.1f} ms | {middle:.1f} ({low:.1f}-{high:.1f}) ms "
            f"| {middle / point.simulated_s / 1e3:.2f} | {middle / point.shared_s / 1e3:.2f} |"
        )
    return "\n".join(rows)


def draw(points: list[Point], path: Path) -> None:
    """A row for each point: simulated and measured."""
    figure = Figure(figsize=(8, 0.42 * len(points) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = range(len(points))
    quartiles = np.array([np.percentile(p.measured_s, [25, 50, 75]) for p in points]).T * 1e3
    low, middle, high = quartiles
    axes.barh(rows, middle, height=0.6, color="#9dbde6", label="measured, with quartiles")
    spread = [middle - low, high - middle]
    axes.errorbar(middle, rows, xerr=spread, fmt="none", ecolor="#3b6fb6", capsize=3)
    simulated = [point.simulated_s * 1e3 for point in points]
    shared = [point.shared_s * 1e3 for point in points]
    axes.scatter(simulated, rows, marker="o", color="#c4622d", zorder=3, label="simulated")
    label = "simulated, with both devices slowed"
    axes.scatter(shared, rows, marker="D", s=28, color="black", zorder=2, label=label)
    axes.set_yticks(rows, [point.name for point in points])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3)
    figure.savefig(path, dpi=130)


def overlay(point: Point, profile: pdjax.Profile, path: Path) -> None:
    """Simulated and measured, one above the other, on one axis of time."""
    with point.pipe.record(point.state):
        point.state, _ = point.pipe.step(point.state, point.batch)
    save_timelines([point.pipe.simulate(profile), point.pipe.timeline()], path)


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="in each round, of each pipeline")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--microbatch", type=int, default=64, help="examples in a microbatch")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 4)
    points = [make_point(*point, options) for point in POINTS]
    for point in points:
        measure(point, 2)
        point.measured_s.clear()
    profiles: list[pdjax.Profile] = []
    slowdowns: list[float] = []
    small = make_batch(options.microbatch, options.width)
    params = make_params(options.blocks, options.width)
    profiler = pdjax.Pipeline(loss_fn, optax.sgd(1e-3), num_stages=1, num_microbatches=1)
    for at in range(options.rounds):
        profiles.append(profiler.profile(params, small))
        slowdowns.append(two_at_once(options.width, 4 * options.microbatch))
        for point in points[at % len(points) :] + points[: at % len(points)]:
            measure(point, options.steps)
    profile = sorted(profiles, key=lambda one: sum(one.column("compute_s")))[len(profiles) // 2]
    for point in points:
        simulate(point, profile, float(np.median(slowdowns)))
    print(table(points))
    low, middle, high = np.percentile(slowdowns, [25, 50, 75])
    print(f"\ntwo devices at once are {middle:.2f} ({low:.2f}-{high:.2f}) times slower")
    errors = [abs(np.median(p.measured_s) / p.simulated_s - 1) for p in points if p.workers == 2]
    print(f"2 workers: median error {np.median(errors):.0%}, largest {max(errors):.0%}")
    draw(points, options.output / "accuracy.png")
    overlay(points[6], profile, options.output / "overlay.png")


if __name__ == "__main__":
    main()
