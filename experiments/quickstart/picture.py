"""Draws the picture of the project's README: four devices without and with a pipeline.

    python experiments/quickstart/picture.py

Simulated: four equal stages, 1 ms forward and 2 ms backward each, transfers that take no time. It
takes a second, runs no model, and is the same every time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pdjax.schedules import ALGORITHMS
from pdjax.simulate import StageCost, simulate
from pdjax.timeline.axes import save_figure
from pdjax.timeline.figure import timelines_figure
from pdjax.timeline.timeline import Timeline

NUM_STAGES = 4
STAGE = StageCost(forward_s=1e-3, backward_s=2e-3)
STOP_S = 0.036
PANELS = {
    "model_parallel": "Without a pipeline: one minibatch at a time",
    "pipedream": "PipeDream: several minibatches at a time",
}


def beginning(name: str) -> Timeline:
    """The first milliseconds of a long run."""
    algorithm = ALGORITHMS[name]
    whole = simulate(
        algorithm.make(NUM_STAGES, 1, None),
        [STAGE] * NUM_STAGES,
        rule=algorithm.weight_rule,
        num_minibatches=20,
    )
    return whole.window(0, STOP_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pipedream.png"))
    timelines = [beginning(name) for name in PANELS]
    figure = timelines_figure(timelines)
    figure.set_size_inches(9, 5.6)
    for axes, title, timeline in zip(figure.axes, PANELS.values(), timelines, strict=True):
        shown = f"{title} (idle {timeline.bubble_share:.0%} of these {STOP_S * 1e3:.0f} ms)"
        axes.set_title(shown, loc="left", size=12)
        axes.set_yticks(axes.get_yticks(), [f"device {n}" for n in range(NUM_STAGES)], size=11)
    figure.legends[0].set_title("the number of the minibatch: even dark, odd light")
    save_figure(figure, parser.parse_args().out)


if __name__ == "__main__":
    main()
