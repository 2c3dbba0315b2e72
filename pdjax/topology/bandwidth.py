"""How fast devices, and processes, pass data to each other.

`python -m pdjax.bandwidth` prints it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from pdjax.communication.remote import RemoteTransport
from pdjax.communication.transport import Transport
from pdjax.distributed import Peers

ALONE_BYTES_PER_S = 10e9
"""What is said of a device that has no other to send to: about what one PCIe 3.0 slot carries. A
plan for one worker does not depend on it."""


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


def measure_between_processes(peers: Peers, num_bytes: int = 2**24, repeats: int = 7) -> float:
    """Bytes/s of the link of the process that has the slowest, in either direction.

    Around a ring each process sends to the next one and receives from the one before, over the wire
    that pipelines use. To be called in all processes at the same time.

    Args:
        peers: the processes.
        num_bytes: size of the array that each sends.
        repeats: how often it is sent; the median counts.

    Returns:
        The same in all processes.

    Raises:
        ValueError: if there is only one process.
    """
    if peers.num_processes < 2:
        raise ValueError("there is one process; expected several to measure between.")
    first = {device.process_index: device for device in reversed(jax.devices())}
    places = [SingleDeviceSharding(first[process]) for process in range(peers.num_processes)]
    transport = RemoteTransport(places, peers)
    data = jax.device_put(np.ones(num_bytes, np.uint8), places[peers.process_id])
    (seconds,) = _median_s([partial(_pass_on, transport, data)], repeats, transport.barrier)
    return num_bytes / max(peers.exchange("seconds on the slowest link", seconds))


def _pass_on(transport: Transport, data: jax.Array) -> Sequence[jax.Array] | None:
    """Sends `data` to the next process; returns what the one before sends.

    Every second link comes first: where a process does one after the other, all links of a half are
    busy at once.
    """
    count, received = len(transport.is_local), None
    for source in (*range(0, count, 2), *range(1, count, 2)):
        target = (source + 1) % count
        mine = [data] if transport.is_local[source] else None
        moved = transport.send_recv(mine, [data], source, target)
        if transport.is_local[target]:
            received = moved
    return received


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


def _median_s(
    sends: Sequence[Callable[[], Any]], repeats: int, meet: Callable[[], None] = lambda: None
) -> list[float]:
    """Seconds that each of `sends` takes. They take turns, after a first turn that warms up.

    Args:
        sends: what is timed.
        repeats: how many turns are counted.
        meet: returns when all are ready who take part.
    """
    seconds: list[list[float]] = [[] for _ in sends]
    for _ in range(repeats + 1):
        for send, taken in zip(sends, seconds, strict=True):
            meet()
            start = time.perf_counter()
            jax.block_until_ready(send())
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in seconds]
