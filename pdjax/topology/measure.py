"""How devices of several processes are joined, measured by all of these together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import jax

from pdjax.distributed import Peers
from pdjax.profile.cached import local_topology
from pdjax.topology.bandwidth import measure_between_processes
from pdjax.topology.topology import Level, Topology

_NUM_BYTES = 2**23
_REPEATS = 5


def joint_topology(devices: Sequence[Any], peers: Peers) -> Topology:
    """The topology of devices of several processes. To be called in all of them at the same time.

    Two levels where each process has equally many of the devices, one after the other; else one,
    with the links between processes. The slowest link counts on either level.

    Args:
        devices: the workers, in order.
        peers: the processes.
    """
    own = [device for device in devices if device.process_index == jax.process_index()]
    mine: dict[str, Any] = {"between": measure_between_processes(peers, _NUM_BYTES, _REPEATS)}
    if own:
        local = local_topology(own)
        mine["within"] = local.levels[0].bandwidth_bytes_per_s
        mine["memory"] = local.memory_bytes
    said = peers.exchange("links and memory", mine)
    between = min(each["between"] for each in said)
    levels, runs = (Level(len(devices), between),), _runs(devices)
    if len(set(runs)) == 1 and runs[0] > 1:
        within = min(each["within"] for each in said if "within" in each)
        levels = (Level(runs[0], within), Level(len(runs), between))
    return Topology(levels, _memory(devices, [each.get("memory", ()) for each in said]))


def _memory(devices: Sequence[Any], said: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The memory of each device, from that of each process's; empty if some is not known."""
    left = [list(sizes) for sizes in said]
    owners = [device.process_index for device in devices]
    if not all(left[owner] for owner in owners):
        return ()
    return tuple(left[owner].pop(0) for owner in owners)


def _runs(devices: Sequence[Any]) -> list[int]:
    """How many devices follow each other in each process; empty if it has some in other places."""
    runs = [(owner, len(list(same))) for owner, same in groupby(d.process_index for d in devices)]
    return [length for _, length in runs] if len(dict(runs)) == len(runs) else []
