"""Whether a pipeline's devices are in this process alone, and what follows."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Sharding

from pdjax import distributed
from pdjax.distributed import Peers
from pdjax.runtime.remote import TransferTransport
from pdjax.runtime.transport import LocalTransport, Transport


def peers_of(placements: Sequence[Sharding]) -> Peers | None:
    """The processes that the devices are in; None if all are in this one.

    Raises:
        ValueError: if they are in several, and these do not know of each other.
    """
    devices = [next(iter(placement.device_set)) for placement in placements]
    if all(device.process_index == jax.process_index() for device in devices):
        return None
    peers = distributed.current()
    if peers is None:
        raise ValueError(
            f"the devices {devices} are in several processes, which do not know of each other. "
            "Call pdjax.distributed.initialize() in each of them before anything else; it calls "
            "jax.distributed.initialize. Or give devices=jax.local_devices()."
        )
    return peers


def make_transport(placements: Sequence[Sharding], peers: Peers | None) -> Transport:
    """How values travel between these places."""
    return (
        LocalTransport(len(placements)) if peers is None else TransferTransport(placements, peers)
    )
