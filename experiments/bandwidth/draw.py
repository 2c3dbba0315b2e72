"""Draws headline.png and bars.png from results.json.

    python experiments/bandwidth/draw.py

headline.png: examples a second against the rate of the links. bars.png: the slowest links, with
data parallelism as if its all-reduce were hidden beside the measured systems.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
COLOURS = {
    "PipeDream": "#17396b",
    "PipeDream, 4 stages": "#7fa9df",
    "GPipe": "#228c83",
    "data parallel": "#ec9840",
    "model parallel": "#878787",
}
TITLES = {
    "vgg16": "VGG-16",
    "lstm": "LSTM language model, 6 layers",
    "lstm_4": "LSTM language model, 4 layers",
    "resnet20": "ResNet-20",
}
HIDDEN = 5 / 4
"""Data parallelism on the slowest links: a step is 1 part computing and 4 parts all-reduce. If the
all-reduce hid the computing, it would be 4 parts."""


def points(results, system):
    """Rates, and for each the smallest, median and largest figure and the prediction."""
    found = [one for one in results if system in one["measured"]]
    rates = [one["mbit_per_s"] for one in found]
    several = [[r["examples_per_s"] for r in one["measured"][system]] for one in found]
    spread = np.percentile(several, (0, 50, 100), axis=1)
    return np.asarray(rates), spread, [one["predicted"][system] for one in found]


def ratio(one, system):
    """Median over the rounds of a system's speed over that of data parallelism."""
    several, base = one["measured"][system], one["measured"]["data parallel"]
    pairs = zip(several, base, strict=True)
    return np.median([a["examples_per_s"] / b["examples_per_s"] for a, b in pairs])


def draw_lines(axis, results):
    """One panel: measured figures filled, predicted ones hollow, ratios above PipeDream's."""
    for system in (s for s in COLOURS if any(s in one["measured"] for one in results)):
        colour = COLOURS[system]
        rates, (least, middle, most), predicted = points(results, system)
        error = (middle - least, most - middle)
        axis.errorbar(rates, middle, error, color=colour, marker="o", label=system, capsize=3)
        axis.plot(rates, predicted, color=colour, marker="o", mfc="none", ls=":", lw=1)
    for one in results:
        top = max(r["examples_per_s"] for r in one["measured"]["PipeDream"])
        text = f"×{ratio(one, 'PipeDream'):.2f}"
        place = (one["mbit_per_s"], top)
        axis.annotate(
            text,
            place,
            (7, 5),
            textcoords="offset points",
            color=COLOURS["PipeDream"],
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )
    rates = sorted({one["mbit_per_s"] for one in results})
    axis.set_xscale("log")
    axis.set_xticks(rates, [f"{rate:,.0f}" for rate in rates], minor=False)
    axis.set_xticks([], minor=True)
    axis.set_xlim(rates[0] / 1.3, rates[-1] * 1.9)
    axis.set_xlabel("links, Mbit/s (logarithmic)")
    axis.set_ylim(0, axis.get_ylim()[1] * 1.08)
    axis.spines[["top", "right"]].set_visible(False)


def draw_headline(results):
    models = [model for model in TITLES if any(one["model"] == model for one in results)]
    rows = 1 if len(models) < 4 else 2
    columns = -(-len(models) // rows)
    size = (4.2 * columns + 2.2, 3.6 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    axes = grid.flat[: len(models)]
    for axis, model in zip(axes, models, strict=True):
        draw_lines(axis, [one for one in results if one["model"] == model])
        axis.set(title=TITLES[model], ylabel="examples/s")
    named = {
        name: handle
        for axis in axes
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        named.values(),
        named.keys(),
        loc="outside right upper",
        frameon=False,
        title="filled: measured\nhollow: predicted\n×: PipeDream over\n    data parallel",
        alignment="left",
    )
    figure.savefig(HERE / "headline.png", dpi=110)


def bars_of(one):
    """Label, examples a second, kB for each example and colour; predicted ones have no bytes."""
    hidden = one["predicted"]["data parallel"] * HIDDEN
    found = []
    for system in ("data parallel", "model parallel", "GPipe", "PipeDream"):
        several = one["measured"][system]
        speed = np.median([r["examples_per_s"] for r in several])
        sent = np.median([r["bytes_per_example"] for r in several]) / 1e3
        found.append((system, speed, f"{sent:,.0f} kB", COLOURS[system]))
    hidden_bar = ("data parallel,\nall-reduce hidden\n(computed)", hidden, found[0][2], "none")
    return [found[0], hidden_bar, *found[1:]]


def draw_bars(results):
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.2), layout="constrained")
    for axis, model in zip(axes, ("vgg16", "lstm"), strict=True):
        one = min((r for r in results if r["model"] == model), key=lambda r: r["mbit_per_s"])
        names, speeds, sent, colours = zip(*bars_of(one)[::-1], strict=True)
        drawn = axis.barh(names, speeds, color=colours, edgecolor=[COLOURS["data parallel"]] * 5)
        for bar, colour in zip(drawn, colours, strict=True):
            bar.set(hatch="//" if colour == "none" else "", linewidth=1 if colour == "none" else 0)
        axis.bar_label(drawn, [f" {s:.2f}   {b}" for s, b in zip(speeds, sent, strict=True)])
        axis.set_xlim(0, max(speeds) * 1.45)
        axis.set(title=f"{TITLES[model]}, {one['mbit_per_s']:,.0f} Mbit/s")
        axis.set_xlabel("examples/s; beside it the bytes sent for each example")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "bars.png", dpi=110)


def draw(results):
    draw_headline(results)
    draw_bars(results)


if __name__ == "__main__":
    draw(json.loads((HERE / "results.json").read_text()))
