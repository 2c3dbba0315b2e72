"""What pdjax costs on top of the computation.

The toy model of toy.py, minibatches of 256 examples in 8 microbatches, Adam. Every system takes a
step in turn, again and again, so that they meet the same noise; the figures are medians with the
quartiles, and the ratios are medians of the ratios within a turn.

    python experiments/overhead/benchmark.py --width 8
    python experiments/overhead/benchmark.py --width 256
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

import jax

jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp
import numpy as np
import optax
from hand_written import HandWritten
from toy import NUM_BLOCKS, block, equal_cuts, loss_fn, make_batch, make_params, mean_square

import pdjax


def plain_step(optimizer, num_microbatches):
    """The whole step in one jit, microbatches in a scan."""

    def step(params, state, batch):
        if num_microbatches == 1:
            loss, grads = jax.value_and_grad(loss_fn)(params, batch, None)
        else:
            parts = jax.tree.map(lambda a: a.reshape(num_microbatches, -1, *a.shape[1:]), batch)

            def one(total, part):
                loss, grads = jax.value_and_grad(loss_fn)(params, part, None)
                return jax.tree.map(jnp.add, total, grads), loss

            grads, losses = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), parts)
            grads, loss = jax.tree.map(lambda g: g / num_microbatches, grads), losses.mean()
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


class Plain:
    def __init__(self, params, optimizer, num_microbatches):
        self.params = jax.tree.map(jnp.copy, params)
        self.state = optimizer.init(self.params)
        self.run = plain_step(optimizer, num_microbatches)

    def step(self, batch):
        self.params, self.state, loss = self.run(self.params, self.state, batch)
        return self.params, loss


class Hand:
    def __init__(self, params, optimizer, num_stages, num_microbatches):
        blocks = [params[f"block_{i}"] for i in range(NUM_BLOCKS)]
        self.pipe = HandWritten(block, blocks, mean_square, optimizer, num_stages, num_microbatches)

    def step(self, batch):
        losses = self.pipe.step(batch["x"], batch["y"])
        return self.pipe.weights, losses


class Ours:
    def __init__(self, params, optimizer, num_stages, num_microbatches, **options):
        self.pipe = pdjax.Pipeline(
            loss_fn,
            optimizer,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            plan=equal_cuts(num_stages),
            **options,
        )
        self.state = None
        self.params = params

    def step(self, batch):
        if self.state is None:
            self.state = self.pipe.init(self.params, batch)
        self.state, metrics = self.pipe.step(self.state, batch)
        return [stage.lasting.weights for stage in self.state.run.stages], metrics["loss"]


def spectrax_systems(params, optimizer, num_microbatches):
    try:
        from spectrax_toy import SpectraX
    except ImportError as error:
        sys.exit(f"--spectrax needs SpectraX, pip install spectrax-lib ({error})")
    functions = {"block_fn": block, "loss_fn": mean_square, "optimizer": optimizer}
    return {
        f"SpectraX 1F1B, {n} stages": SpectraX(params, n, num_microbatches, **functions)
        for n in (4, 2)
    }


def measure(systems, batch, turns, steps):
    seconds = {name: [] for name in systems}
    for system in systems.values():
        for _ in range(3):
            jax.block_until_ready(system.step(batch))
    names = list(systems)
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for _ in range(steps):
                done = systems[name].step(batch)
            jax.block_until_ready(done)
            seconds[name].append((time.perf_counter() - start) / steps)
    return {name: np.array(values) for name, values in seconds.items()}


def quartiles(values):
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:7.3f} ({low:.3f}-{high:.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--steps", type=int, default=0, help="steps in a turn (default: by width)")
    parser.add_argument("--numpy", action="store_true", help="hand over numpy batches")
    parser.add_argument("--spectrax", action="store_true", help="also time SpectraX, if installed")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    steps = args.steps or (20 if args.width < 64 else 2)
    m = 8
    optimizer = optax.adam(1e-3)
    params = make_params(args.width)
    batch = make_batch(args.width, args.batch_size)
    if not args.numpy:
        batch = jax.tree.map(jnp.asarray, batch)
    systems = {
        "one jit, scan over 8 microbatches": Plain(params, optimizer, m),
        "hand-written 1F1B, 4 stages": Hand(params, optimizer, 4, m),
        "pdjax 1F1B, 4 stages": Ours(params, optimizer, 4, m),
        "hand-written 1F1B, 2 stages": Hand(params, optimizer, 2, m),
        "pdjax 1F1B, 2 stages": Ours(params, optimizer, 2, m),
        "plain jitted train step": Plain(params, optimizer, 1),
        "pdjax, 1 stage, 1 microbatch": Ours(params, optimizer, 1, 1),
        "pdjax, 1 stage, 8 microbatches": Ours(params, optimizer, 1, m),
    }
    if args.spectrax:
        systems |= spectrax_systems(params, optimizer, m)
    seconds = measure(systems, batch, args.turns, steps)
    print(f"jax {jax.__version__}, width {args.width}, {args.turns} turns of {steps} steps")
    for name, values in seconds.items():
        print(f"  {name:36s} {quartiles(values * 1e3)} ms")
    pairs = [
        ("pdjax 1F1B, 4 stages", "hand-written 1F1B, 4 stages"),
        ("pdjax 1F1B, 2 stages", "hand-written 1F1B, 2 stages"),
        ("pdjax 1F1B, 4 stages", "one jit, scan over 8 microbatches"),
        ("pdjax 1F1B, 2 stages", "one jit, scan over 8 microbatches"),
        ("pdjax, 1 stage, 1 microbatch", "plain jitted train step"),
        ("pdjax, 1 stage, 8 microbatches", "one jit, scan over 8 microbatches"),
    ]
    if args.spectrax:
        pairs += [(f"pdjax 1F1B, {n} stages", f"SpectraX 1F1B, {n} stages") for n in (4, 2)]
    for ours, other in pairs:
        print(f"  {ours} / {other}: {quartiles(seconds[ours] / seconds[other])}")
    if args.output:
        record = {name: values.tolist() for name, values in seconds.items()}
        args.output.write_text(json.dumps({"width": args.width, "seconds": record}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
