"""Draws headline.png from results.json: examples a second against the rate of the links."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
COLOURS = {
    "PipeDream": "#26599a",
    "PipeDream, 4 stages": "#92c5de",
    "data parallel": "#b2182b",
    "GPipe": "#5aae61",
    "model parallel": "#878787",
}
TITLES = {
    "vgg16": "VGG-16",
    "lstm": "LSTM language model",
    "lstm_4": "LSTM language model, 4 layers",
    "resnet20": "ResNet-20",
}


def points(results, system):
    """Rates, and of each the smallest, median and largest figure and what was predicted."""
    found = [one for one in results if system in one["measured"]]
    rates = [one["mbit_per_s"] for one in found]
    several = [[r["examples_per_s"] for r in one["measured"][system]] for one in found]
    spread = np.percentile(several, (0, 50, 100), axis=1)
    return np.asarray(rates), spread, [one["predicted"][system] for one in found]


def draw(results):
    """One panel for each model: what was measured filled, what was predicted hollow."""
    models = [model for model in TITLES if any(one["model"] == model for one in results)]
    rows = 1 if len(models) < 4 else 2
    columns = -(-len(models) // rows)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.4 * columns + 2, 3.6 * rows), layout="constrained", squeeze=False
    )
    axes = grid.flat[: len(models)]
    for axis, model in zip(axes, models, strict=True):
        mine = [one for one in results if one["model"] == model]
        for system in (s for s in COLOURS if any(s in one["measured"] for one in mine)):
            colour = COLOURS[system]
            rates, (least, middle, most), predicted = points(mine, system)
            error = (middle - least, most - middle)
            axis.errorbar(rates, middle, error, color=colour, marker="o", label=system, capsize=3)
            axis.plot(rates, predicted, color=colour, marker="o", mfc="none", ls=":", lw=1)
        rates = sorted({one["mbit_per_s"] for one in mine})
        axis.set_xscale("log")
        axis.set_xticks(rates, [f"{rate:,.0f}" for rate in rates], minor=False)
        axis.set_xticks([], minor=True)
        axis.set(title=TITLES[model], xlabel="links, Mbit/s", ylabel="examples/s")
        axis.set_ylim(bottom=0)
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
        title="filled: measured\nhollow: predicted",
    )
    figure.savefig(HERE / "headline.png", dpi=130)


if __name__ == "__main__":
    draw(json.loads((HERE / "results.json").read_text()))
