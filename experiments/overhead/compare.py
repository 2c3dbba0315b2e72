"""The time of a step under two checkouts of pdjax, in turns: what did a change cost, or gain?

    python experiments/overhead/compare.py OLD_CHECKOUT [--width 8] [--rounds 15] [--steps 20]

Each checkout trains the toy model in a process of its own; the two take turns, so that both see the
same machine. Prints the medians of seconds and processor seconds of a step, and the median ratio
new / old within a round with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CASES = {  # name: stages, microbatches
    "1F1B, 4 stages, 8 microbatches": (4, 8),
    "1 stage, 8 microbatches": (1, 8),
    "1 stage, 1 microbatch": (1, 1),
}

WORKER = """
import json, sys, time
import jax
jax.config.update("jax_num_cpu_devices", 4)
import optax
import toy
import pdjax
width, stages, count, steps = map(int, sys.argv[1:])
pipe = pdjax.Pipeline(
    toy.loss_fn, optax.adam(1e-3), num_stages=stages, num_microbatches=count,
    plan=toy.equal_cuts(stages),
)
batch = toy.make_batch(width, 256)
state = pipe.init(toy.make_params(width), batch)
for line in sys.stdin:
    start, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        state, metrics = pipe.step(state, batch)
    metrics["loss"].block_until_ready()
    took = time.perf_counter() - start, time.process_time() - processor
    print(json.dumps([value / steps for value in took]), flush=True)
"""


def start(checkout: Path, width: int, stages: int, count: int, steps: int):
    path = os.pathsep.join([str(checkout), str(HERE)])
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, (width, stages, count, steps))],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def turn(worker) -> list[float]:
    worker.stdin.write("\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="a checkout to compare with this one")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    for name, (stages, count) in CASES.items():
        checkouts = options.old, HERE.parents[1]
        workers = [start(each, options.width, stages, count, options.steps) for each in checkouts]
        for worker in workers:
            turn(worker)
        rounds = []
        for number in range(options.rounds):
            order = [0, 1] if number % 2 else [1, 0]
            found = {which: turn(workers[which]) for which in order}
            rounds.append([found[0], found[1]])
        for worker in workers:
            worker.communicate()  # closes its input, at whose end it stops
        report(name, np.array(rounds))


def report(name: str, rounds: np.ndarray) -> None:
    """Prints a case; the shape of `rounds` is (rounds, old and new, seconds and processor s)."""
    old, new = np.median(rounds, axis=0) * 1e3
    low, middle, high = np.quantile(rounds[:, 1] / rounds[:, 0], [0.25, 0.5, 0.75], axis=0)
    for at, what in enumerate(("seconds", "processor")):
        print(
            f"{name}, {what}: old {old[at]:.2f} ms, new {new[at]:.2f} ms, "
            f"ratio {middle[at]:.2f} ({low[at]:.2f}-{high[at]:.2f})"
        )


if __name__ == "__main__":
    main()
