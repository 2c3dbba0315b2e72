"""Time to accuracy on slow links: PipeDream against data parallelism.

    sudo python experiments/bandwidth/accuracy.py [--rounds 2]

A small VGG-16 learns the handwritten digits to 97 % test accuracy on four hosts. First both
systems search the same learning rates for the one that needs the fewest examples; their results
do not depend on the links, so one process does that. Then both run with theirs on the
cluster. Prints Markdown, writes the runs to accuracy.json and draws accuracy.png; --draw only draws
the stored runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from benchmark import NUM_HOSTS, measured_on, plans_for, slow_rate
from cluster import Cluster
from digits_worker import EXAMPLES_PER_WORKER, GOAL, TASK
from worker import alone

import pdjax
from pdjax import data, distributed
from pdjax.task import make_task

HERE = Path(__file__).parent
STORED = HERE / "accuracy.json"
SYSTEMS = ("PipeDream", "data parallelism")
RATES = (1e-4, 3e-4, 1e-3)
MOST_EXAMPLES = 12_000


def model():
    """The task, and the examples that a host takes at a time."""
    task = make_task(**TASK)
    return task, next(data.batches(task.dataset.train, EXAMPLES_PER_WORKER))


def profile(path):
    """Measures the layers."""
    task, batch = model()
    pipe = pdjax.Pipeline(task.loss_fn, optax.adam(1e-3), schedule="pipedream")
    pipe.profile(jax.eval_shape(lambda: task.params), batch).save(path)


def steps_alone():
    """Measures a step of the whole model on each host."""
    peers = distributed.initialize()
    task, batch = model()
    alone(peers, task.loss_fn, optax.adam(1e-3), task.params, batch)


def command(system, rate, plan, path):
    worker = HERE / "digits_worker.py"
    given = [sys.executable, worker, system, rate, plan, MOST_EXAMPLES, path]
    return list(map(str, given))


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def reached(lines):
    """The line of the first test that reached the goal, or None."""
    return next((line for line in lines if line.get("accuracy", 0) >= GOAL), None)


def search(plan, folder):
    """For each system its learning rate; prints the examples that each rate needed."""
    print("| | learning rate | examples to 97 % |\n|---|---:|---:|")
    best = {}
    for system in SYSTEMS:
        needed = {}
        for rate in RATES:
            path = folder / "search.jsonl"
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            subprocess.run(command(system, rate, plan, path), check=True, env=environment)
            found = reached(read(path))
            needed[rate] = found["examples"] if found else np.inf
            said = f"{needed[rate]:,}" if found else f"more than {MOST_EXAMPLES:,}"
            print(f"| {system} | {rate:g} | {said} |", flush=True)
        best[system] = min(needed, key=needed.__getitem__)
    return best


def smooth(values, width):
    """Medians over a window, so that single minibatches do not hide the course."""
    return [np.median(values[max(0, at - width + 1) : at + 1]) for at in range(len(values))]


def draw_runs(axis, lines, name, **style):
    """One run: its loss, smoothed, or its error in percent."""
    points = [(line["seconds"], line[name]) for line in lines if name in line]
    seconds, values = np.transpose(points)
    width = max(1, len(values) // 20)
    shown = smooth(values, width) if name == "loss" else 100 * (1 - values)
    axis.plot(seconds, shown, lw=1.5, **style)


def draw(runs, rate):
    """Loss and error against time; a colour for each system, a dash pattern for each run."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    colours = dict(zip(SYSTEMS, ("#17396b", "#ec9840"), strict=True))
    for system, several in runs.items():
        for number, lines in enumerate(several):
            style = {"color": colours[system], "ls": ("-", "--", ":")[number % 3]}
            style["label"] = f"{system}, run {number + 1}"
            for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
                draw_runs(axis, lines, name, **style)
    goal = 100 * (1 - GOAL)
    axes[1].axhline(goal, color="grey", lw=0.8)
    place = axes[1].get_yaxis_transform()
    axes[1].text(0.5, goal, f"goal: {GOAL:.0%} right", va="top", color="grey", transform=place)
    axes[0].set(yscale="log", xlabel="seconds", ylabel="training loss, running median (log)")
    axes[1].set(yscale="log", xlabel="seconds", ylabel="test images wrong, % (log)")
    axes[1].set_yticks([3, 5, 10, 20, 50], ["3", "5", "10", "20", "50"])
    axes[1].set_yticks([], minor=True)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(f"{NUM_HOSTS} hosts, links of {rate * 8 / 1e6:.0f} Mbit/s")
    figure.savefig(HERE / "accuracy.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Time to accuracy on slow links.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--draw", action="store_true", help="draw the stored runs only")
    options = parser.parse_args()
    if options.draw:
        return draw(**json.loads(STORED.read_text()))
    with tempfile.TemporaryDirectory() as temporary, Cluster(NUM_HOSTS) as cluster:
        folder = Path(temporary)
        profiles, steps = ([sys.executable, __file__, what] for what in ("profile", "alone"))
        measured = measured_on(cluster, profiles, steps, folder / "profile.json")
        rate = slow_rate(measured)
        plan, _ = plans_for(measured, rate, folder)
        print(f"{rate * 8 / 1e6:.0f} Mbit/s\n\n```\n{plan}\n```\n")
        best = search(folder / "plan.json", folder)
        cluster.set_rate(f"{rate * 8 / 1e6:.3f}mbit")
        runs = {system: [] for system in SYSTEMS}
        for _ in range(options.rounds):
            for system in SYSTEMS:
                path = folder / "run.jsonl"
                given = command(system, best[system], folder / "plan.json", path)
                told = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
                if cluster.run(given, environment=told):
                    raise SystemExit(f"{system} failed")
                runs[system].append(read(path))
        STORED.write_text(json.dumps({"runs": runs, "rate": rate}) + "\n")
        draw(runs, rate)
    print("\n| | learning rate | examples | seconds to 97 % |\n|---|---:|---:|---|")
    for system, several in runs.items():
        ends = [reached(lines) for lines in several]
        seconds = " ".join(f"{end['seconds']:.0f}" if end else "never" for end in ends)
        seen = ends[0]["examples"] if ends[0] else "-"
        print(f"| {system} | {best[system]:g} | {seen} | {seconds} |")
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["profile"]:
        profile(sys.argv[2])
    elif sys.argv[1:2] == ["alone"]:
        steps_alone()
    else:
        main()
