"""Do the papers' decisions come out of the models' shapes and the machines alone?

    python experiments/planner/decisions.py

Plans the profiles of this folder for the machines of the PipeDream paper (SOSP 2019, table 2).
Prints tables in Markdown: the plans under the planner's default and with overlap, the plans under
the other formulas, the plan 15-1 where it is possible, and the plans for workers twice as fast.
Draws speedups.png: predicted speed-ups beside those of the paper. Nothing is measured, so the
output is the same on every machine.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pdjax.plan import Plan, PlanOptions, search_plan
from pdjax.plan.cost_model import Part
from pdjax.plan.planner import make_case
from pdjax.profile.files import load_profile
from pdjax.profile.profile import Profile
from pdjax.topology.topology import Topology

PROFILES = Path(__file__).parent / "profiles"

# Hosts of 4 V100 of 16 GB on PCIe, 10 Gbit/s between them (cluster A), and of 8 V100 on NVLink,
# 25 Gbit/s between them (cluster B). 10 GB/s is what the original's own settings take for PCIe
# 3.0 x16; 150 GB/s is NVLink's published rate each way.
CLUSTER_A = "4x4@10GB/s,1.25GB/s:16GiB"
CLUSTER_A_3 = "4x3@10GB/s,1.25GB/s:16GiB"
CLUSTER_B = "8x2@150GB/s,3.125GB/s:16GiB"
FLAT_A = "16@1.25GB/s:16GiB"
FLAT_A_SHARED = "16@0.3125GB/s:16GiB"

FORMS: dict[str, dict[str, Any]] = {
    "ring, summed": {},  # the planner's default
    "ring, overlapped": {"overlap": True},
    "paper's, overlapped": {"sync": "paper", "overlap": True},
    "original's, summed": {"sync": "original"},
}
"""Ways to put computing and all-reduce together: bytes of an all-reduce, and sum or maximum."""

DRAWN = {"ring, summed": "#ec9840", "ring, overlapped": "#228c83"}
"""The forms in the picture, and their colours; the paper's own figures are dark blue."""


@dataclass(frozen=True)
class Row:
    """A model on some machines.

    Attributes:
        model: name of its profile.
        topology: the machines.
        config: the configuration that the paper reports.
        speedup: the time of data parallelism over that of the configuration, as measured there.
    """

    model: str
    topology: str
    config: str = ""
    speedup: str = ""

    @property
    def shape(self) -> str:
        return self.topology.rpartition(":")[0]


PAPER = (
    Row("vgg16", CLUSTER_A, "15-1", "5.28"),
    Row("vgg16", CLUSTER_B, "15-1", "2.98"),
    Row("resnet50", CLUSTER_A, "16", "1.00"),
    Row("resnet50", CLUSTER_B, "16", "1.00"),
    Row("gnmt8", CLUSTER_A_3, "straight", "2.95 (*)"),
    Row("gnmt8", CLUSTER_B, "16 (*)", "1.00 (*)"),
    Row("gnmt16", CLUSTER_A, "straight", "2.92 (**)"),
    Row("gnmt16", CLUSTER_B, "straight", "3.14"),
)

GPIPE_SLOWER = "35 to 71 %"
"""By how much GPipe is slower than PipeDream for GNMT-16 on 16 GPUs, in the paper's text."""


def load(model: str, share: float = 1.0) -> Profile:
    """A profile, with all times multiplied by `share`."""
    profile = load_profile(PROFILES / f"{model}.json")
    layers = (
        replace(layer, forward_s=layer.forward_s * share, backward_s=layer.backward_s * share)
        for layer in profile.layers
    )
    return replace(profile, layers=tuple(layers))


def options(model: str, **more: Any) -> PlanOptions:
    """The paper trains translation with Adam, images with momentum."""
    size = 2.0 if model.startswith("gnmt") else 1.0
    return PlanOptions(optimizer_bytes_per_param_byte=size, **more)


def plan(row: Row, share: float = 1.0, **more: Any) -> Plan:
    topology = Topology.parse(row.topology)
    return search_plan(load(row.model, share), topology, options(row.model, **more))


def times(found: Plan) -> tuple[float, float]:
    """Milliseconds for each minibatch of the plan and of data parallelism."""
    prediction = found.prediction
    assert prediction is not None
    return prediction.chosen.microbatch_s * 1e3, prediction.others[0].microbatch_s * 1e3


def stages(found: Plan) -> str:
    """Replicas, with the layer that begins each stage: ``"12-1, at dense_0"``."""
    starts = [found.layers[first] for first in found.first_layers[1:]]
    if not starts:
        return f"{found.notation} (data parallelism)"
    return f"{found.notation}, at {', '.join(f'`{name}`' for name in starts[:3])}" + (
        ", …" if len(starts) > 3 else ""
    )


def speedup(found: Plan) -> float:
    """The time of data parallelism over that of the plan."""
    ours, other = times(found)
    return other / ours


def decided(share: float = 1.0, **form: Any) -> None:
    print(
        "| model | machines | our plan | ms | data parallelism, ms | speed-up | "
        "straight, ms | the paper's plan | its speed-up |"
        "\n|---|---|---|---:|---:|---:|---:|---|---:|"
    )
    for row in PAPER:
        found = plan(row, share, **form)
        ours, other = times(found)
        straight, _ = times(plan(row, share, replicate=False, **form))
        print(
            f"| {row.model} | `{row.shape}` | {stages(found)} | {ours:.1f} | {other:.1f} | "
            f"{other / ours:.2f} | {straight:.1f} | {row.config} | {row.speedup} |"
        )


def forms() -> dict[str, list[float]]:
    """Prints the plan of each form for each row; returns the speed-ups by form."""
    found: dict[str, list[float]] = {name: [] for name in FORMS}
    print("| model | machines |" + "".join(f" {name} |" for name in FORMS) + " the paper |")
    print("|---|---|" + "---|" * len(FORMS) + "---|")
    for row in PAPER:
        cells = []
        for name, form in FORMS.items():
            made = plan(row, **form)
            found[name].append(speedup(made))
            cells.append(f"{made.notation}: {speedup(made):.2f}")
        paper = f"{row.config}: {row.speedup}"
        print(f"| {row.model} | `{row.shape}` | {' | '.join(cells)} | {paper} |")
    return found


def fifteen_and_one(share: float) -> None:
    """The paper's plan for VGG-16 on lines of 16 workers, beside ours and data parallelism."""
    print(
        "| workers | form | our plan | ms | 15-1 at its best cut, ms | data parallelism, ms |\n"
        "|---|---|---|---:|---:|---:|"
    )
    for topology in (FLAT_A, FLAT_A_SHARED):
        row = Row("vgg16", topology)
        for name, form in FORMS.items():
            found = plan(row, share, **form)
            ours, other = times(found)
            at, paper = best_15_1(row, share, **form)
            print(
                f"| `{row.shape}` | {name} | {stages(found)} | {ours:.1f} | {paper:.1f} at "
                f"`{at}` | {other:.1f} |"
            )


def best_15_1(row: Row, share: float, **form: Any) -> tuple[str, float]:
    """Where 15-1 is best cut, and its milliseconds for each minibatch."""
    profile = load(row.model, share)
    costs = make_case(profile, Topology.parse(row.topology), options(row.model, **form)).costs
    count = len(profile.layers)
    found = []
    for at in range(1, count):
        parts = (Part(0, at, 15, 0), Part(at, count, 1, 15))
        if costs.excess_bytes(parts) == 0:
            found.append((costs.plan_s(parts) * 1e3, profile.names[at]))
    seconds, name = min(found)
    return name, seconds


def gpipe() -> None:
    """GPipe beside PipeDream, both straight, for the model that the paper compares them on."""
    print(
        "| machines | straight PipeDream, ms | GPipe, 16 microbatches, ms | GPipe over PipeDream "
        "| the paper: GPipe is slower by |\n"
        "|---|---:|---:|---:|---|"
    )
    for row in (row for row in PAPER if row.model == "gnmt16"):
        prediction = plan(row, replicate=False).prediction
        assert prediction is not None
        ours_ms = prediction.chosen.microbatch_s * 1e3
        (other,) = [each for each in prediction.others if each.name.startswith("GPipe")]
        other_ms = other.microbatch_s * 1e3
        cells = f"{ours_ms:.1f} | {other_ms:.1f} | {other_ms / ours_ms:.2f}"
        print(f"| `{row.shape}` | {cells} | {GPIPE_SLOWER} |")


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Bars for each row of the paper: its measured speed-up beside the predicted ones."""
    bars = {"the paper, measured": ([float(row.speedup.split()[0]) for row in PAPER], "#17396b")}
    bars |= {f"predicted: {name}": (found[name], color) for name, color in DRAWN.items()}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(bars)
    for number, (label, (values, color)) in enumerate(bars.items()):
        places = [at + (number - 1) * width for at in range(len(PAPER))]
        drawn = axes.bar(places, values, width, color=color, label=label)
        axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=1)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.text(len(PAPER) - 0.5, 1, " data\n parallelism", va="center", fontsize=8, color="grey")
    axes.set_xlim(-0.6, len(PAPER) - 0.5)
    cluster = {CLUSTER_A: "A", CLUSTER_A_3: "A", CLUSTER_B: "B"}
    names = [
        f"{row.model}\n{row.shape.partition('@')[0]}, {cluster[row.topology]}" for row in PAPER
    ]
    axes.set_xticks(range(len(PAPER)), names)
    axes.set(ylabel="speed-up over data parallelism")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_name("speedups.png"))
    args = parser.parse_args()
    for name in DRAWN:
        print(f"Plans: {name}\n")
        decided(**FORMS[name])
        print()
    print("Plan and predicted speed-up under each form\n")
    draw(forms(), args.picture)
    print("\nGPipe, GNMT-16: ring, summed\n")
    gpipe()
    for share in (1.0, 0.5):
        print(f"\nVGG-16 on a line of 16 workers, layers that take {share:g} of the estimate\n")
        fifteen_and_one(share)
    for name in DRAWN:
        print(f"\nPlans if all layers take half as long: {name}\n")
        decided(0.5, **FORMS[name])


if __name__ == "__main__":
    sys.exit(main())
