"""Is the all-reduce among replicas hidden behind computing?

    sudo python experiments/bandwidth/overlap.py [--rounds 3]

Two hosts, each with a replica of a stage of 16.8 MB under PipeDream; the link is so slow that the
all-reduce of a round takes about as long as its passes. Updates come at once, or a round late.
"""

import argparse
import contextlib
import io
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
from cluster import Cluster

WIDTH, NUM_LAYERS, NUM_EXAMPLES, STEPS, RATE = 1024, 4, 512, 24, "200mbit"


def train(lag):
    """One process: seconds of a round, in the steady state."""
    import jax
    import jax.numpy as jnp
    import optax

    import pdjax

    peers = pdjax.distributed.initialize()

    def loss_fn(params, batch):
        for name in sorted(params):
            batch = jnp.tanh(batch @ params[name])
        return jnp.mean(batch**2)

    def init():
        keys = jax.random.split(jax.random.key(0), NUM_LAYERS)
        return {f"w{n}": jax.random.normal(key, (WIDTH, WIDTH)) / 32 for n, key in enumerate(keys)}

    schedule = pdjax.pipedream(1, replicas=(2,), update_lag=lag)
    pipe = pdjax.Pipeline(loss_fn, optax.sgd(1e-3), schedule=schedule, plan="balanced")
    batch = np.random.default_rng(0).normal(size=(NUM_EXAMPLES, WIDTH)).astype(np.float32)
    state = pipe.init(init, batch)
    marks = []
    for count in (8, STEPS):
        for _ in range(count):
            state, _ = pipe.step(state, batch)
        jax.block_until_ready([held.lasting.weights for held in state.run.stages])
        marks.append(time.perf_counter())
    pipe.drain(state)
    if peers.process_id == 0:
        print("RESULT " + json.dumps((marks[1] - marks[0]) / STEPS * 2), flush=True)


def run(cluster, lag):
    """Seconds of a round of two minibatches."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cluster.run([sys.executable, __file__, "--worker", str(lag)])
    lines = [line for line in said.getvalue().splitlines() if "RESULT " in line]
    if code or not lines:
        raise SystemExit(f"failed with {code}:\n{said.getvalue()}")
    return json.loads(lines[0].partition("RESULT ")[2])


def main():
    parser = argparse.ArgumentParser(description="Is the all-reduce hidden behind computing?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", type=int)
    options = parser.parse_args()
    if options.worker is not None:
        return train(options.worker)
    found = {(rate, lag): [] for rate in (None, RATE) for lag in (0, 1)}
    with Cluster(2) as cluster:
        for _ in range(options.rounds):
            for rate, lag in found:
                cluster.set_rate(rate)
                found[rate, lag].append(run(cluster, lag))
    print("| link | updates | ms a round | smallest-largest |\n|---|---|---:|---|")
    for (rate, lag), seconds in found.items():
        ms = np.asarray(seconds) * 1e3
        late = "a round late" if lag else "at once"
        print(
            f"| {rate or 'fast'} | {late} | {np.median(ms):.0f} | {ms.min():.0f}-{ms.max():.0f} |"
        )
    return None


if __name__ == "__main__":
    main()
