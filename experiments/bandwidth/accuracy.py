"""Time to accuracy on slow links: PipeDream against data parallelism.

    sudo python experiments/bandwidth/accuracy.py [--rounds 2]

A small VGG-16 learns the handwritten digits to 97 % test accuracy on four hosts. First both
systems search the same learning rates for the one that needs the fewest examples; what they compute
does not depend on the links, so that is done in one process. Then both run with theirs on the
cluster. Prints Markdown, and draws accuracy.png.
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
    """For each system its learning rate; prints what each rate needed."""
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


def draw(runs, rate):
    """Loss and accuracy against time, one line for each run."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    colours = dict(zip(SYSTEMS, ("#26599a", "#b2182b"), strict=True))
    for system, several in runs.items():
        for number, lines in enumerate(several):
            label = system if number == 0 else None
            for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
                points = [(line["seconds"], line[name]) for line in lines if name in line]
                seconds, values = np.transpose(points)
                if name == "loss":
                    width = max(1, len(values) // 60)
                    seconds = seconds[width - 1 :]
                    values = np.convolve(values, np.ones(width) / width, "valid")
                axis.plot(seconds, values, color=colours[system], label=label, lw=1.3)
    axes[0].set_yscale("log")
    axes[0].set(xlabel="seconds", ylabel="training loss")
    axes[1].axhline(GOAL, color="grey", lw=0.8, ls="--")
    axes[1].set(xlabel="seconds", ylabel="test accuracy", ylim=(0, 1))
    axes[0].legend(frameon=False)
    figure.suptitle(f"{NUM_HOSTS} hosts, links of {rate * 8 / 1e6:.0f} Mbit/s")
    figure.savefig(HERE / "accuracy.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description="Time to accuracy on slow links.")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
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
        draw(runs, rate)
    print("\n| | learning rate | examples | seconds to 97 % |\n|---|---:|---:|---|")
    for system, several in runs.items():
        ends = [reached(lines) for lines in several]
        seconds = " ".join(f"{end['seconds']:.0f}" if end else "never" for end in ends)
        seen = ends[0]["examples"] if ends[0] else "-"
        print(f"| {system} | {best[system]:g} | {seen} | {seconds} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["profile"]:
        profile(sys.argv[2])
    elif sys.argv[1:2] == ["alone"]:
        steps_alone()
    else:
        main()
