"""Data parallelism, model parallelism, GPipe and PipeDream on four hosts with slow links.

    sudo python experiments/bandwidth/benchmark.py [--model lstm] [--rounds 2] [--steps 8]

The hosts are network namespaces of this machine (see experiments/cluster). Their links are shaped
so that data parallelism spends 80 % of its time communicating, then four and sixteen times as
fast. The systems take turns. Prints Markdown, writes results.json, in which figures of other models
stay, and draws headline.png and bars.png.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from pdjax.launch import memory_variables
from pdjax.plan import PlanOptions
from pdjax.profile.files import load_profile
from pdjax.simulate import plan_pipeline
from pdjax.topology.topology import Topology

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
sys.path.insert(0, str(HERE.parent / "cluster"))
from cluster import Cluster
from draw import draw

NUM_HOSTS, COMMUNICATION_SHARE = 4, 0.8
SYSTEMS = ("data parallel", "PipeDream", "model parallel", "GPipe")
FASTER = (1, 4, 16)
STRAIGHT = "PipeDream, 4 stages"
NAMES = {"data parallel": "data parallelism", "model parallel": "model parallelism, 4 stages"}


def measured_on(cluster, profiles, steps, path):
    """A profile of the layers on one core, stretched to the time of a step while all hosts compute.

    Hosts share cores, caches and the way to memory.

    Args:
        cluster: the hosts.
        profiles: a command that profiles, into a file named behind it.
        steps: a command that takes steps of the whole model on each host, and says how long one is.
        path: the file.
    """
    told = os.environ | memory_variables()  # as on the hosts
    subprocess.run(["taskset", "-c", "0", *profiles, path], check=True, env=told)
    profile = load_profile(path)
    stretch = result_of(cluster, steps, path.parent / "cache")["step_s"] / compute_s(profile)
    print(
        f"a step is {stretch:.2f} times as long as the layers of {path.stem} one by one on a core"
    )
    layers = tuple(
        replace(layer, forward_s=layer.forward_s * stretch, backward_s=layer.backward_s * stretch)
        for layer in profile.layers
    )
    return replace(profile, layers=layers)


def compute_s(profile):
    """Seconds of the passes of all layers."""
    return sum(layer.forward_s + layer.backward_s for layer in profile.layers)


def slow_rate(profile):
    """Bytes per second at which an all-reduce takes four times as long as the passes."""
    size = sum(layer.param_bytes for layer in profile.layers)
    ring = 2 * (NUM_HOSTS - 1) / NUM_HOSTS * size
    return ring / (compute_s(profile) * COMMUNICATION_SHARE / (1 - COMMUNICATION_SHARE))


def plans_for(profile, rate, folder):
    """The planner's plan, and the fastest of one stage for each host; with their files."""
    topology = Topology.parse(f"{NUM_HOSTS}@{rate / 1e6:.3f}MB/s")
    common = {"schedule": "pipedream", "optimizer_bytes_per_param_byte": 1.0}
    plan = plan_pipeline(profile, topology, PlanOptions(**common))
    options = PlanOptions(**common, num_stages=NUM_HOSTS, replicate=False)
    straight = plan_pipeline(profile, topology, options)
    for name, made in (("plan", plan), ("straight", straight)):
        made.save(folder / f"{name}.json")
    return plan, straight


def result_of(cluster, command, cache):
    """What the first process says that runs a command."""
    said = io.StringIO()
    told = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}
    told |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    with contextlib.redirect_stdout(said):
        code = cluster.run(list(map(str, command)), environment=told)
    lines = [line for line in said.getvalue().splitlines() if "RESULT " in line]
    if code or not lines:
        raise SystemExit(f"{command} failed with {code}:\n{said.getvalue()}")
    return json.loads(lines[0].partition("RESULT ")[2])


def predicted(plan, straight, system):
    """Examples per second that the planner predicts of the plan that the system runs."""
    said = plan.prediction if system in ("PipeDream", "data parallel") else straight.prediction
    name = NAMES.get(system, system)
    found = [s for s in said.others if s.name.startswith(name)]
    chosen = said.chosen if "PipeDream" in system else (found[0] if found else None)
    return None if chosen is None else said.batch_size / chosen.microbatch_s


def compare(cluster, model, profile, rate, systems, options, folder):
    """The systems in turns at one rate; for each its figures, round by round."""
    plan, straight = plans_for(profile, rate, folder)
    if plan.replicas != straight.replicas:
        systems = (*systems, STRAIGHT)
    cluster.set_rate(f"{rate * 8 / 1e6:.3f}mbit")
    print(f"\n{model} at {rate * 8 / 1e6:.0f} Mbit/s\n\n```\n{plan}\n```", flush=True)
    found = {system: [] for system in systems}
    for _ in range(options.rounds):
        for system in systems:
            file = folder / ("plan.json" if system == "PipeDream" else "straight.json")
            command = [sys.executable, HERE / "worker.py", system, model, file, options.steps]
            made = result_of(cluster, command, folder / "cache")
            found[system].append(made)
            print(made, file=sys.stderr, flush=True)
    return {
        "model": model,
        "mbit_per_s": rate * 8 / 1e6,
        "compute_s": compute_s(profile),
        "predicted": {system: predicted(plan, straight, system) for system in systems},
        "measured": found,
    }


def table(result):
    """One rate as Markdown."""
    measured = result["measured"]
    base = [one["examples_per_s"] for one in measured["data parallel"]]
    sent = np.median([one["bytes_per_example"] for one in measured["data parallel"]])
    print("| | replicas | examples/s | over data parallelism | predicted | kB/example | fewer |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for system, rounds in measured.items():
        rate = [one["examples_per_s"] for one in rounds]
        ratios = np.divide(rate, base)
        size = np.median([one["bytes_per_example"] for one in rounds])
        said = result["predicted"][system]
        print(
            f"| {system} | {'-'.join(map(str, rounds[0]['replicas']))} | {np.median(rate):.2f} | "
            f"{np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | "
            f"{'' if said is None else f'{said:.2f}'} | {size / 1e3:,.0f} | "
            f"{1 - size / sent:.1%} |"
        )


def kept():
    """The figures of earlier runs."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def main():
    parser = argparse.ArgumentParser(description="Four systems on slow links.")
    parser.add_argument("--model", nargs="*", default=["vgg16", "lstm", "resnet20"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--faster", type=int, nargs="*", default=FASTER)
    options = parser.parse_args()
    results = [one for one in kept() if one["model"] not in options.model]
    with tempfile.TemporaryDirectory() as temporary, Cluster(NUM_HOSTS) as cluster:
        folder = Path(temporary)
        for model in options.model:
            worker = [sys.executable, HERE / "worker.py"]
            profiles, steps = ([*worker, what, model] for what in ("profile", "alone"))
            profile = measured_on(cluster, profiles, steps, folder / f"{model}.json")
            slow = slow_rate(profile)
            for factor in options.faster:
                systems = SYSTEMS if factor == 1 else SYSTEMS[:2]
                rate = slow * factor
                results.append(compare(cluster, model, profile, rate, systems, options, folder))
                table(results[-1])
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)


if __name__ == "__main__":
    main()
