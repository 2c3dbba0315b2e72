"""The topology of the devices at hand: of this process, or of several that measure together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import jax

from pdjax.cache import cached, kind_of_device
from pdjax.distributed import Peers
from pdjax.topology.bandwidth import ALONE_BYTES_PER_S, measure_bandwidth, measure_between_processes
from pdjax.topology.topology import Level, Topology

_NUM_BYTES = 2**23
_REPEATS = 5


def local_topology(
    devices: Sequence[Any] | None = None, *, bandwidth_bytes_per_s: float | None = None
) -> Topology:
    """The devices of this process as workers, on equal links.

    Args:
        devices: the workers, in order; all local devices if None.
        bandwidth_bytes_per_s: of their links; measured if None, which takes about a second (see
            `pdjax.topology.bandwidth.measure_bandwidth`), or taken from an earlier measurement.

    Returns:
        One level. It has the memory that the devices may use where all of them report it; else
        (the devices of a CPU do not) memory is unlimited.

    Raises:
        ValueError: if there are no devices, or one belongs to another process.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    if bandwidth_bytes_per_s is None:
        bandwidth_bytes_per_s = _bandwidth(devices)
    stats = [device.memory_stats() or {} for device in devices]
    known = all("bytes_limit" in found for found in stats)
    memory = tuple(int(found["bytes_limit"]) for found in stats) if known else ()
    return Topology((Level(len(devices), bandwidth_bytes_per_s),), memory)


def _bandwidth(devices: Sequence[Any]) -> float:
    """Bytes/s between devices: measured, or from before."""
    if len(devices) == 1:  # no link matters
        return ALONE_BYTES_PER_S
    about = ("bandwidth", [(device.id, *kind_of_device(device)) for device in devices])
    return cached("bandwidth", about, lambda: str(measure_bandwidth(devices)), _read_bandwidth)


def _read_bandwidth(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(f"a bandwidth of {value} bytes/s")
    return value


def joint_topology(devices: Sequence[Any], peers: Peers) -> Topology:
    """The topology of devices of several processes. To be called in all of them at the same time.

    Two levels where each process has equally many of the devices, one after the other; else one,
    with the links between processes. The slowest link counts on either level.

    Args:
        devices: the workers, in order.
        peers: the processes.
    """
    own = [device for device in devices if device.process_index == jax.process_index()]
    local: dict[str, Any] = {"between": measure_between_processes(peers, _NUM_BYTES, _REPEATS)}
    if own:
        own_topology = local_topology(own)
        local["within"] = own_topology.levels[0].bandwidth_bytes_per_s
        local["memory"] = own_topology.memory_bytes
    reported = peers.exchange("links and memory", local)
    between = min(each["between"] for each in reported)
    levels, runs = (Level(len(devices), between),), _runs(devices)
    if len(set(runs)) == 1 and runs[0] > 1:
        within = min(each["within"] for each in reported if "within" in each)
        levels = (Level(runs[0], within), Level(len(runs), between))
    return Topology(levels, _memory(devices, [each.get("memory", ()) for each in reported]))


def _memory(devices: Sequence[Any], reported: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The memory of each device, from that of each process's; empty if some is not known."""
    left = [list(sizes) for sizes in reported]
    owners = [device.process_index for device in devices]
    if not all(left[owner] for owner in owners):
        return ()
    return tuple(left[owner].pop(0) for owner in owners)


def _runs(devices: Sequence[Any]) -> list[int]:
    """How many devices follow each other in each process; empty if it has some in other places."""
    runs = [(owner, len(list(same))) for owner, same in groupby(d.process_index for d in devices)]
    return [length for _, length in runs] if len(dict(runs)) == len(runs) else []
