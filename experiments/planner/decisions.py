"""Do the papers' decisions come out of the models' shapes and the machines alone?

    python experiments/planner/decisions.py

Plans the profiles of this folder for the machines of the PipeDream paper (SOSP 2019, table 2) and
prints four tables in Markdown: what is decided, what the other ways to put times together would
decide, the plan 15-1 where it is possible, and what faster workers would change.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pdjax.plan import Plan, PlanOptions, plan_pipeline
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
    "ring, overlapped": {},
    "paper's, overlapped": {"sync": "paper"},
    "original's, summed": {"sync": "original", "overlap": False},
}


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
    asked: dict[str, Any] = {"overlap": True} | more
    return PlanOptions(optimizer_bytes_per_param_byte=size, **asked)


def plan(row: Row, share: float = 1.0, **more: Any) -> Plan:
    topology = Topology.parse(row.topology)
    return plan_pipeline(load(row.model, share), topology, options(row.model, **more))


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


def decided(share: float = 1.0) -> None:
    print(
        "| model | machines | our plan | ms | data parallelism, ms | speed-up | "
        "straight, ms | the paper's plan | its speed-up |"
        "\n|---|---|---|---:|---:|---:|---:|---|---:|"
    )
    for row in PAPER:
        found = plan(row, share)
        ours, other = times(found)
        straight, _ = times(plan(row, share, straight=True))
        print(
            f"| {row.model} | `{row.shape}` | {stages(found)} | {ours:.1f} | {other:.1f} | "
            f"{other / ours:.2f} | {straight:.1f} | {row.config} | {row.speedup} |"
        )


def forms() -> None:
    print("| model | machines |" + "".join(f" {name} |" for name in FORMS) + " the paper |")
    print("|---|---|" + "---|" * len(FORMS) + "---|")
    for row in PAPER:
        cells = []
        for form in FORMS.values():
            found = plan(row, **form)
            ours, other = times(found)
            cells.append(f"{found.notation}: {other / ours:.2f}")
        paper = f"{row.config}: {row.speedup}"
        print(f"| {row.model} | `{row.shape}` | {' | '.join(cells)} | {paper} |")


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


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("What is decided: a ring for each all-reduce, overlapped with computing\n")
    decided()
    print("\nOther ways to put times together: plan and predicted speed-up\n")
    forms()
    for share in (1.0, 0.5):
        print(f"\nVGG-16 on a line of 16 workers, layers that take {share:g} of the estimate\n")
        fifteen_and_one(share)
    print("\nWhat is decided if all layers take half as long\n")
    decided(0.5)


if __name__ == "__main__":
    sys.exit(main())
