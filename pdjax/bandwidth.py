"""`python -m pdjax.bandwidth`: how fast the devices here, and the hosts, pass data to each other.

It prints a table and the topology that a plan is made for:

    python -m pdjax.bandwidth                                             # this host's devices
    python -m pdjax.bandwidth --coordinator host0:9000 --num-processes 2 --process-id 0   # on host0
    python -m pdjax.bandwidth --coordinator host0:9000 --num-processes 2 --process-id 1   # on host1

Between devices of one process an array is copied from one to the other. Between processes all of
them reduce an array over one device each; a ring passes 2(m−1)/m times its bytes over the link of
each of m processes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from pdjax.topology import Level, Topology, format_bytes

ALONE_BYTES_PER_S = 10e9
"""What is said of a device that has no other to send to: about what one PCIe 3.0 slot carries. A
plan for one worker does not depend on it."""


@dataclass(frozen=True)
class BandwidthConfig:
    """Measures the bandwidth between devices, and between hosts."""

    num_devices: int | None = None
    """Make this many virtual devices of a CPU; by default there is one."""
    num_bytes: int = 2**24
    """Size of the arrays that are sent."""
    repeats: int = 7
    """How often each is sent; the median counts."""
    coordinator: str | None = None
    """Address and port of process 0, such as host0:9000, to measure between processes as well."""
    num_processes: int | None = None
    """Number of processes, one for each host; with --coordinator."""
    process_id: int | None = None
    """Number of this process, from 0; with --coordinator."""

    def check(self) -> None:
        """Raises ValueError if the arguments make no sense."""
        for name in ("num_devices", "num_bytes", "repeats", "num_processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1.")
        distributed = (self.coordinator, self.num_processes, self.process_id)
        if len({value is None for value in distributed}) > 1:
            raise ValueError(
                "--coordinator, --num-processes and --process-id go together; give all or none."
            )
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 0):
            raise ValueError(
                f"--process-id {self.process_id}: expected 0 to {(self.num_processes or 0) - 1}."
            )


def measure_bandwidth(devices: Sequence[Any], num_bytes: int = 2**24, repeats: int = 7) -> float:
    """Bytes that pass from one device to another in a second: the median over all pairs.

    Args:
        devices: devices of this process.
        num_bytes: size of the array that is sent.
        repeats: how often it is sent on each pair.

    Returns:
        Bytes/s; `ALONE_BYTES_PER_S` for a single device.

    Raises:
        ValueError: if there are no devices, or one is another process's.
    """
    found = measure_pairs(devices, num_bytes, repeats)
    return statistics.median(found.values()) if found else ALONE_BYTES_PER_S


def measure_pairs(
    devices: Sequence[Any], num_bytes: int = 2**24, repeats: int = 7
) -> dict[tuple[int, int], float]:
    """Bytes/s from each device to each other one, by their positions; see `measure_bandwidth`."""
    _check_local(devices)
    ones = np.ones(num_bytes, np.uint8)
    data = [jax.device_put(ones, device) for device in devices]
    pairs = list(permutations(range(len(devices)), 2))
    sends = [partial(jax.device_put, data[source], devices[target]) for source, target in pairs]
    seconds = _median_s(sends, repeats)
    return {pair: num_bytes / took for pair, took in zip(pairs, seconds, strict=True)}


def measure_between_processes(num_bytes: int = 2**24, repeats: int = 7) -> float:
    """Bytes/s of the link of each process, by an all-reduce over the first device of each.

    To be called in all processes of `jax.distributed` at the same time.

    Raises:
        ValueError: if there is only one process.
    """
    first = {device.process_index: device for device in reversed(jax.devices())}
    count = len(first)
    if count < 2:
        raise ValueError("there is one process; expected several to measure between.")
    mesh = Mesh(np.array([first[process] for process in sorted(first)]), ("process",))
    rows = NamedSharding(mesh, PartitionSpec("process"))
    num_floats = max(num_bytes // 4, 1)
    mine = np.zeros((1, num_floats), np.float32)
    data = jax.make_array_from_process_local_data(rows, mine, (count, num_floats))
    reduce = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    (seconds,) = _median_s([lambda: reduce(data)], repeats)
    return 2 * (count - 1) / count * 4 * num_floats / seconds


def _check_local(devices: Sequence[Any]) -> None:
    if not devices:
        raise ValueError("there are no devices; expected at least one.")
    for device in devices:
        if device.process_index != jax.process_index():
            raise ValueError(
                f"{device} belongs to process {device.process_index}, this is process "
                f"{jax.process_index()}; expected devices of one process. For several, run "
                "python -m pdjax.bandwidth with --coordinator in each."
            )


def _median_s(sends: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds that each of `sends` takes. They take turns, after a first turn that warms up."""
    seconds: list[list[float]] = [[] for _ in sends]
    for _ in range(repeats + 1):
        for send, taken in zip(sends, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(send())
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in seconds]


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 for arguments that make no sense."""
    config = tyro.cli(BandwidthConfig, args=arguments, prog="python -m pdjax.bandwidth")
    try:
        measure(config, Console(highlight=False))
    except ValueError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False)
        return 2
    return 0


def measure(config: BandwidthConfig, console: Console) -> Topology:
    """Measures as `config` says, prints what it found, and returns the topology.

    Raises:
        ValueError: if the configuration makes no sense, or the processes have different numbers of
            devices.
    """
    config.check()
    if config.num_devices is not None:
        jax.config.update("jax_num_cpu_devices", config.num_devices)
    if config.coordinator is not None:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    devices = jax.local_devices()
    pairs = measure_pairs(devices, config.num_bytes, config.repeats)
    if pairs:
        console.print(_table(devices, pairs))
    inside = _rounded(statistics.median(pairs.values()) if pairs else ALONE_BYTES_PER_S)
    topology = Topology.local(devices, bandwidth_bytes_per_s=inside)
    if jax.process_count() > 1:
        _check_equal_processes()
        between = _rounded(measure_between_processes(config.num_bytes, config.repeats))
        console.print(f"between processes: {format_bytes(between)}/s", markup=False)
        topology = _of_processes(topology, between)
    elif not pairs:
        console.print("one device: there is nothing to measure")
    if jax.process_index() == 0:  # the others have measured nearly the same
        console.print(f"--topology {topology}", markup=False, soft_wrap=True)
    return topology


def _check_equal_processes() -> None:
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"the processes have different numbers of devices: {dict(sorted(counts.items()))}; "
            "expected as many in each. Show each process the same number of them."
        )


def _of_processes(local: Topology, between: float) -> Topology:
    """The topology of equal processes; a process with one worker is no level of its own."""
    count = jax.process_count()
    inside = local.levels if local.num_workers > 1 else ()
    return Topology((*inside, Level(count, between)), local.memory_bytes * count)


def _rounded(bytes_per_s: float) -> float:
    """To three digits: more are noise."""
    return float(f"{bytes_per_s:.3g}")


def _table(devices: Sequence[Any], pairs: dict[tuple[int, int], float]) -> Table:
    table = Table("from \\ to", *map(str, devices))
    for source, device in enumerate(devices):
        rates = [pairs.get((source, target)) for target in range(len(devices))]
        cells = ["" if rate is None else f"{format_bytes(rate)}/s" for rate in rates]
        table.add_row(str(device), *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
