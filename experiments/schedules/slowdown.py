"""Whether two that compute at once slow each other down: two devices of one process, two processes.

    python experiments/schedules/slowdown.py

Every program runs in one thread. A chain of calls runs on one device alone, and then on two at
once: on two CPU devices of one process that may use all cores, and in two processes that are pinned
to a core each. They take turns, in several rounds. Prints how many times longer two take than one
alone, as medians with quartiles.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 "
    + os.environ.get("XLA_FLAGS", "")
)

import jax
import jax.numpy as jnp
import numpy as np

Chain = tuple[Any, Any, Any]
"""What a chain begins with, and the two weights of the block that it repeats, on one device."""


def make_chain(device: Any, width: int, size: int) -> Chain:
    """A residual block on a device, and a microbatch of `size` examples."""
    rng = np.random.default_rng(0)
    shapes = (size, width), (width, 2 * width), (2 * width, width)
    x, up, down = (rng.normal(size=shape).astype(np.float32) / width for shape in shapes)
    return jax.device_put((x, up, down), device)


@jax.jit
def block(x: Any, up: Any, down: Any) -> Any:
    """The residual block of `accuracy.py`."""
    return x + jnp.tanh(x @ up) @ down


def seconds(chains: Sequence[Chain], calls: int) -> float:
    """How long the chains take, each of so many calls on its device, all at the same time."""
    start = time.perf_counter()
    values = [x for x, _, _ in chains]
    for _ in range(calls):
        values = [block(x, up, down) for x, (_, up, down) in zip(values, chains, strict=True)]
    jax.block_until_ready(values)
    return time.perf_counter() - start


def serve(asked: Connection, num_devices: int, options: Any) -> None:
    """In a process of its own: answers with the seconds of as many chains as it is asked for."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    chains = [make_chain(device, options.width, options.size) for device in jax.devices()]
    seconds(chains, options.calls)
    while count := asked.recv():
        asked.send(seconds(chains[:count], options.calls))


def start(cores: Sequence[int], num_devices: int, options: Any) -> Connection:
    """Starts such a process on these cores."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # child processes inherit it
    context.Process(target=serve, args=(there, num_devices, options), daemon=True).start()
    os.sched_setaffinity(0, before)
    return here


def slowdown(
    alone: Sequence[tuple[Connection, int]], together: Sequence[tuple[Connection, int]]
) -> float:
    """How many times longer the slowest takes if those in `together` run at once."""
    taken = []
    for group in (alone, together):
        for process, count in group:
            process.send(count)
        taken.append(max(process.recv() for process, _ in group))
    return taken[1] / taken[0]


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--calls", type=int, default=200, help="in a chain")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--size", type=int, default=64, help="examples in a microbatch")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    one = start(cores, 2, options)
    first, second = (start([core], 1, options) for core in cores)
    cases = {
        "two devices of one process": ([(one, 1)], [(one, 2)]),
        "two processes, pinned to a core each": ([(first, 1)], [(first, 1), (second, 1)]),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, (alone, together) in cases.items():
            found[name].append(slowdown(alone, together))
    for name, ratios in found.items():
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(f"{name}: {middle:.2f} ({low:.2f}-{high:.2f}) times as long as one alone")
    for process in (one, first, second):
        process.send(0)


if __name__ == "__main__":
    main()
