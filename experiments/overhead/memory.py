"""Counts the bytes that each stage holds, and sets them beside the formula.

After every program that the executor dispatches, the distinct arrays that a stage refers to are
added up: weights (the newest and those that the stash refers to), optimizer state, and what the
stash keeps of the microbatches in flight. The largest sums are printed beside

    weights     versions alive x bytes of the stage's parameters: 1 version under a synchronous
                schedule, n - s on stage s of n under PipeDream
    optimizer   bytes of what optax makes for these parameters
    stash       microbatches in flight x the arrays that a backward pass derived by hand would
                keep: x, x W + b and the tanh inside gelu (9 x width numbers an example) of each
                block; on the last stage what comes out of it and the target too

    python experiments/overhead/memory.py --width 256
"""

from __future__ import annotations

import argparse
import sys

import jax

jax.config.update("jax_num_cpu_devices", 4)

import numpy as np
import optax
from toy import NUM_BLOCKS, equal_cuts, loss_fn, make_batch, make_params

import pdjax

KINDS = ("weights", "optimizer", "stash")
OPTIMIZER = optax.adam(1e-3)


def count(tree):
    """Bytes of the distinct arrays in a tree of arrays or of their shapes."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves.values())


def counted(schedule, params, batch, num_stages, num_microbatches, steps=4):
    """For each stage the largest sums over some steps, found by walking the arrays."""
    pipe = pdjax.Pipeline(
        loss_fn,
        OPTIMIZER,
        schedule=schedule,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        plan=equal_cuts(num_stages),
    )
    state = pipe.init(params, batch)
    stages = state.run.stages
    peaks = [dict.fromkeys(KINDS, 0) for _ in stages]

    def observe(*_):
        for held, peak in zip(stages, peaks, strict=True):
            stashed = list(held.in_flight.stash.values())
            now = {
                "weights": count([held.lasting.weights, *[entry.weights for entry in stashed]]),
                "optimizer": count(held.lasting.optimizer),
                "stash": count([(entry.given, entry.values) for entry in stashed]),
            }
            peak.update({kind: max(peak[kind], now[kind]) for kind in KINDS})

    state.executor.observer = observe
    for _ in range(steps * num_stages):
        state, _ = pipe.step(state, batch)
    return peaks


def formula(schedule, params, width, rows, num_stages, num_microbatches):
    """For each stage what the papers say it needs, for microbatches of `rows` examples."""
    blocks, per_stage = list(params.values()), NUM_BLOCKS // num_stages
    needed = []
    for s in range(num_stages):
        mine = blocks[s * per_stage : (s + 1) * per_stage]
        in_flight = {
            "gpipe": num_microbatches,
            "one_f_one_b": min(num_stages - s, num_microbatches),
            "pipedream": num_stages - s,
        }[schedule]
        numbers = 9 * per_stage + (2 if s == num_stages - 1 else 0)
        needed.append(
            {
                "weights": count(mine) * (num_stages - s if schedule == "pipedream" else 1),
                "optimizer": count(jax.eval_shape(OPTIMIZER.init, mine)),
                "stash": in_flight * rows * numbers * width * 4,
            }
        )
    return needed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32, help="examples in a microbatch")
    parser.add_argument("--num-stages", type=int, default=4)
    parser.add_argument("--num-microbatches", type=int, default=8)
    args = parser.parse_args()
    params = make_params(args.width)
    print(f"width {args.width}, microbatches of {args.rows}, {args.num_stages} stages; bytes:")
    print("counted at the peak / by the formula")
    print("| schedule | stage |" + "".join(f" {kind} |" for kind in KINDS))
    print("|---|---|" + "---|" * len(KINDS))
    for schedule in ("gpipe", "one_f_one_b", "pipedream"):
        m = 1 if schedule == "pipedream" else args.num_microbatches
        batch = make_batch(args.width, args.rows * m)
        peaks = counted(schedule, params, batch, args.num_stages, m)
        needed = formula(schedule, params, args.width, args.rows, args.num_stages, m)
        for s, (peak, need) in enumerate(zip(peaks, needed, strict=True)):
            cells = "".join(f" {peak[kind]:,} / {need[kind]:,} |" for kind in KINDS)
            print(f"| `{schedule}` | {s} |{cells}")


if __name__ == "__main__":
    sys.exit(main())
