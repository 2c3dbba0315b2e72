"""Trains a small model over all devices of all processes, and writes what came out."""

import json
import sys
from pathlib import Path

import jax

cases = json.loads(sys.argv[1])
jax.config.update("jax_num_cpu_devices", cases["devices"])
jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
import optax  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
import zoo  # noqa: E402

import pdjax  # noqa: E402
from pdjax import distributed, schedules  # noqa: E402


def run(spec):
    case = zoo.dense_blocks(num_blocks=4, dropout=0.2).double()
    make = getattr(schedules, spec["schedule"])
    schedule = make(
        *spec["sizes"],
        **{k: tuple(v) if isinstance(v, list) else v for k, v in spec["options"].items()},
    )
    optimizer = optax.adam(1e-2, eps=1e-3)
    if spec.get("clip"):
        optimizer = optax.chain(optax.clip_by_global_norm(0.1), optimizer)
    pipe = pdjax.Pipeline(case.loss_fn, optimizer, schedule=schedule, plan="balanced")
    size = 2 * schedule.num_microbatches
    batches = [case.make_batch(size, seed) for seed in range(spec["steps"])]
    state = pipe.init(case.params, batches[0], rng=jax.random.key(5))
    losses = []
    for index, batch in enumerate(batches):
        if index in spec["drains"]:
            state = pipe.drain(state)
        state, metrics = pipe.step(state, batch)
        losses.append(metrics["loss"])
    state = pipe.drain(state)
    evaluated = pipe.evaluate(state, case.make_batch(4, 99), num_microbatches=2)
    found = {
        "losses": np.asarray([float(x) for x in losses]),
        "eval": np.asarray(float(evaluated["loss"])),
    }
    for number, leaf in enumerate(jax.tree.leaves(pipe.params(state))):
        found[f"param {number}"] = np.asarray(leaf)
    return found


peers = distributed.initialize() if distributed.is_needed() else None
process = peers.process_id if peers else 0
for name, spec in cases["runs"].items():
    np.savez(Path(cases["output"]) / f"{name}-{process}.npz", **run(spec))
