"""`python -m pdjax.bandwidth`: how fast the devices here, and the hosts, pass data to each other.

It prints a table and the topology that a plan is made for:

    python -m pdjax.bandwidth                                             # this host's devices
    python -m pdjax.bandwidth --coordinator host0:9000 --num-processes 2 --process-id 0   # on host0
    python -m pdjax.bandwidth --coordinator host0:9000 --num-processes 2 --process-id 1   # on host1

Between devices of one process an array is copied from one to the other. Between processes each
sends an array to the next one, around a ring, in the way that pipelines send theirs.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from pdjax import distributed
from pdjax.cli import print_error, run_command
from pdjax.errors import ClusterError
from pdjax.topology.bandwidth import ALONE_BYTES_PER_S, measure_between_processes, measure_pairs
from pdjax.topology.measure import local_topology
from pdjax.topology.topology import Level, Topology
from pdjax.units import format_bytes


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


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    0 for success, 1 if the processes do not come together, 2 for arguments that make no sense.
    """
    try:
        return run_command("pdjax.bandwidth", BandwidthConfig, measure, arguments, wraps=True)
    except ClusterError as error:
        print_error(f"error: {error}")
        return 1


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
        distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    devices = jax.local_devices()
    pairs = measure_pairs(devices, config.num_bytes, config.repeats)
    if pairs:
        console.print(_table(devices, pairs))
    inside = _rounded(statistics.median(pairs.values()) if pairs else ALONE_BYTES_PER_S)
    topology = local_topology(devices, bandwidth_bytes_per_s=inside)
    peers = distributed.current()
    if peers is not None and peers.num_processes > 1:
        _check_equal_processes()
        between = _rounded(measure_between_processes(peers, config.num_bytes, config.repeats))
        console.print(f"between processes: {format_bytes(between)}/s", markup=False)
        topology = _of_processes(topology, between)
    elif not pairs:
        console.print("one device: there is nothing to measure")
    if jax.process_index() == 0:
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
    code = main()  # first: it replaces sys.exit, so that the other processes hear of the code
    sys.exit(code)
