"""How well a profile predicts the time of stages.

    python experiments/planner/predicted.py

Each stage's forward and backward pass, derived and compiled as a pipeline derives and compiles
them, is timed against the sum of its layers in the profile. In every round the profile is measured
again, then the stages of all plans, so that both meet the same machine. Prints a table in Markdown,
writes its figures to predicted.json and draws predicted.png; --draw only draws.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pdjax.plan import Plan, PlanOptions, manual_plan, search_plan
from pdjax.profile.measure import measure
from pdjax.profile.profile import Profile
from pdjax.profile.timing import Pass, make_inputs, sample, saved_values
from pdjax.split.differentiate import StagePrograms, differentiate
from pdjax.split.stages import split
from pdjax.task import make_task
from pdjax.topology.topology import Topology
from pdjax.trace.layers import LayerGraph, build_graph
from pdjax.trace.random_key import taking_key

HERE = Path(__file__).parent
_COLORS = {"transformer": "#17396b", "vgg16": "#ec9840"}
_MARKERS = {"planned": "o", "by hand": "s"}


@dataclass(frozen=True)
class Model:
    """What is timed: a model of pdjax, examples in a microbatch, and cuts made by hand."""

    name: str
    fields: tuple[str, ...]
    batch_size: int
    planned: tuple[int, ...]
    by_hand: tuple[tuple[str, ...], ...]


MODELS = {
    "transformer": Model(
        "transformer",
        ("width=256", "num_heads=4", "num_blocks=4"),
        8,
        (2, 3, 4),
        (("block_1",), ("block_0/mlp_in", "head"), ("block_0", "block_1/mlp_out", "block_2")),
    ),
    "vgg16": Model(
        "vgg16",
        ("width_multiplier=0.5", "dense_width=1024"),
        8,
        (2, 3, 4),
        (("conv_1",), ("conv_2", "dense_0"), ("conv_1", "conv_9", "head")),
    ),
}


@dataclass
class Timed:
    """A plan, and its figures in each round.

    Attributes:
        model: name of the model.
        kind: "planned" or "by hand".
        plan: the stages.
        calls: a forward and a backward pass of each stage.
        predicted_s: for each round and stage the sum of the layers of the round's profile.
        measured_s: for each round and stage both of its passes.
    """

    model: str
    kind: str
    plan: Plan
    calls: list[list[Callable[[], Any]]]
    predicted_s: list[list[float]] = field(default_factory=list)
    measured_s: list[list[float]] = field(default_factory=list)

    def errors(self) -> np.ndarray:
        """Predicted over measured, less 1: ``[rounds, stages]``."""
        return np.array(self.predicted_s) / np.array(self.measured_s) - 1

    def slowest_errors(self) -> np.ndarray:
        """The same of the slowest stage, which decides the throughput: ``[rounds]``."""
        return np.max(self.predicted_s, axis=1) / np.max(self.measured_s, axis=1) - 1


def trace(model: Model) -> tuple[LayerGraph, Any]:
    """The model and a microbatch."""
    task = make_task(model.name, model_fields=model.fields, initial="shapes")
    examples = [task.dataset.train[at] for at in range(model.batch_size)]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
    loss_fn = taking_key(task.loss_fn, task.model_state is not None)
    graph = build_graph(
        loss_fn, task.params, batch, jax.random.key(0), model_state=task.model_state
    )
    return graph, batch


def compile_plan(graph: LayerGraph, plan: Plan, batch: Any) -> list[list[Callable[[], Any]]]:
    """The passes of each stage, bound to made-up weights and activations."""
    place = SingleDeviceSharding(jax.local_devices()[0])
    stages = split(graph, plan.first_layers)
    leaves = jax.tree.leaves(batch)
    made = differentiate(stages, plan.remat)
    return [_bound(graph, programs, leaves, place) for programs in made]


def _bound(
    graph: LayerGraph, programs: StagePrograms, batch: list[Any], place: Sharding
) -> list[Callable[[], Any]]:
    forward, backward = Pass(programs.forward, place), Pass(programs.backward, place)
    forward.compile()
    backward.compile()
    stage, consts = programs.stage, graph.traced.program.consts
    known = {var: consts[i] for var, i in zip(programs.inputs["consts"], stage.consts, strict=True)}
    known |= zip(programs.inputs["batch"], (batch[i] for i in stage.batch), strict=True)
    values = make_inputs(programs, {*forward.reads, *backward.reads}, known, place)
    first = forward.bind(values)
    values |= saved_values(forward, tuple(first()), programs.forward.outputs["saved"])
    return [first, backward.bind(values)]


def prepare(name: str) -> tuple[Callable[[], Profile], list[Timed]]:
    """A function that measures the model's profile again, and the plans to be timed."""
    model = MODELS[name]
    graph, batch = trace(model)

    def profile() -> Profile:
        return measure(graph, batch_size=model.batch_size, batch=batch, repeats=5)

    first = profile()
    timed = []
    for count in model.planned:
        options = PlanOptions(num_stages=count, replicate=False)
        plan = search_plan(first, Topology.uniform(count, 10e9), options)
        timed.append(Timed(name, "planned", plan, compile_plan(graph, plan, batch)))
    for cuts in model.by_hand:
        plan = manual_plan(first.names, first.column("compute_s"), cuts)
        timed.append(Timed(name, "by hand", plan, compile_plan(graph, plan, batch)))
    return profile, timed


def run_round(profile: Callable[[], Profile], plans: list[Timed]) -> None:
    """Measures a profile, then every stage of every plan."""
    seconds = profile().column("compute_s")
    for timed in plans:
        bounds = [*timed.plan.first_layers, len(timed.plan.layers)]
        timed.predicted_s.append([sum(seconds[a:b]) for a, b in pairwise(bounds)])
        timed.measured_s.append([_stage_s(passes) for passes in timed.calls])


def _stage_s(passes: list[Callable[[], Any]]) -> float:
    """Seconds of both passes of a stage, which take turns as on a worker of its own."""
    return float(np.median(sample(passes, 5), axis=0).sum())


def percent(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, (25, 50, 75)) * 100
    return f"{middle:+.0f} % ({low:+.0f} to {high:+.0f})"


def rows_of(plans: list[Timed]) -> list[dict[str, Any]]:
    """The table: a row for each stage, and one for the slowest stage of each plan."""
    rows = []
    for timed in plans:
        starts = [timed.plan.layers[at] for at in timed.plan.first_layers[1:]]
        plan = {"model": timed.model, "kind": timed.kind, "starts": starts}
        predicted, measured = (
            np.median(seconds, axis=0) * 1e3 for seconds in (timed.predicted_s, timed.measured_s)
        )
        for stage, errors in enumerate(timed.errors().T):
            times = {"predicted_ms": predicted[stage], "measured_ms": measured[stage]}
            rows.append({**plan, "stage": stage, **times, "error_percent": quartiles(errors)})
        times = {"predicted_ms": None, "measured_ms": None}
        errors = quartiles(timed.slowest_errors())
        rows.append({**plan, "stage": "slowest", **times, "error_percent": errors})
    return rows


def quartiles(errors: np.ndarray) -> list[float]:
    """The quartiles in percent: lower, median, upper."""
    return [float(value) for value in np.percentile(errors, (25, 50, 75)) * 100]


def show(rows: list[dict[str, Any]]) -> None:
    print(
        "| model | plan | stages begin at | stage | predicted, ms | measured, ms | error |\n"
        "|---|---|---|---:|---:|---:|---|"
    )
    for row in rows:
        starts = ", ".join(row["starts"])
        what = f"{row['model']} | {row['kind']} | {starts}" if row["stage"] == 0 else " | |"
        times = (row["predicted_ms"], row["measured_ms"])
        figures = " | ".join("" if time is None else f"{time:.1f}" for time in times)
        low, middle, high = row["error_percent"]
        error = f"{middle:+.0f} % ({low:+.0f} to {high:+.0f})"
        print(f"| {what} | {row['stage']} | {figures} | {error} |")


def summarise(plans: list[Timed]) -> None:
    print("\n| model | all stages | slowest stages | error, of either sign, of the slowest |")
    print("|---|---|---|---|")
    for name in dict.fromkeys(timed.model for timed in plans):
        mine = [timed for timed in plans if timed.model == name]
        stages = np.concatenate([timed.errors().ravel() for timed in mine])
        slowest = np.concatenate([timed.slowest_errors() for timed in mine])
        print(f"| {name} | {percent(stages)} | {percent(slowest)} | {percent(abs(slowest))} |")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The error of each stage against its time, a panel for each model."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(_COLORS), sharey=True)
    for axes, model in zip(panels, _COLORS, strict=True):
        axes.axhspan(-10, 10, color="#f0f0f0", zorder=0)
        axes.axhline(0, color="black", linewidth=0.8)
        for kind in _MARKERS:
            chosen = [row for row in rows if (row["model"], row["kind"]) == (model, kind)]
            _draw_errors(axes, [row for row in chosen if row["measured_ms"] is not None])
        axes.set(title=model, xscale="log", xlabel="measured, milliseconds (logarithmic)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title="stages, with quartiles; grey: ±10 %")
    panels[0].set_ylabel("predicted over measured, less 1, %")
    figure.savefig(path, dpi=110)


def _draw_errors(axes: Axes, rows: list[dict[str, Any]]) -> None:
    low, middle, high = np.array([row["error_percent"] for row in rows]).T
    model, kind = rows[0]["model"], rows[0]["kind"]
    axes.errorbar(
        [row["measured_ms"] for row in rows],
        middle,
        (middle - low, high - middle),
        fmt=_MARKERS[kind],
        color=_COLORS[model],
        markerfacecolor=_COLORS[model] if kind == "planned" else "white",
        markersize=6,
        elinewidth=0.9,
        label=kind,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draw", action="store_true", help="draw the stored figures only")
    args = parser.parse_args()
    if not args.draw:
        rows = measure_rounds(args.rounds)
        stored = {"rounds": args.rounds, "rows": rows}
        (HERE / "predicted.json").write_text(json.dumps(stored, indent=1) + "\n")
    draw(json.loads((HERE / "predicted.json").read_text())["rows"], HERE / "predicted.png")


def measure_rounds(count: int) -> list[dict[str, Any]]:
    """Measures all plans in turns and prints the tables; returns the rows of the first one."""
    prepared = [prepare(name) for name in MODELS]
    for number in range(count):
        for profile, plans in prepared:
            run_round(profile, plans)
        print(f"round {number + 1} of {count}", file=sys.stderr)
    plans = [timed for _, several in prepared for timed in several]
    rows = rows_of(plans)
    show(rows)
    summarise(plans)
    return rows


if __name__ == "__main__":
    sys.exit(main())
