"""Which processes run a pipeline, and how values travel between them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Sharding

from pdjax import distributed
from pdjax.communication.remote import RemoteTransport
from pdjax.communication.transport import LocalTransport, Transport
from pdjax.distributed import Peers


def peers_of(placements: Sequence[Sharding], *, chosen_by_user: bool) -> Peers | None:
    """The processes that run a pipeline together; None if this one runs it alone.

    All processes of the run do, those without a stage among them, unless the user chose devices
    of this process only.

    Args:
        placements: where workers may be placed.
        chosen_by_user: whether the user said so, not the number of stages.

    Raises:
        ValueError: if the devices are in several processes, and these do not know of each other;
            or if the user chose devices of one other process.
    """
    devices = [next(iter(placement.device_set)) for placement in placements]
    owners = {device.process_index for device in devices}
    peers = distributed.current()
    alone = peers is None or peers.num_processes == 1
    if owners == {jax.process_index()} and (chosen_by_user or alone):
        return None
    if peers is None:
        raise ValueError(
            f"the devices {devices} are in several processes, which do not know of each other. "
            "Call pdjax.distributed.initialize() in each of them before anything else; it calls "
            "jax.distributed.initialize. Or give devices=jax.local_devices()."
        )
    if chosen_by_user and len(owners) == 1:
        raise ValueError(
            f"all of the devices {devices} are in process {owners.pop()}, which needs no other for "
            f"them, and this is process {peers.process_id}. Leave devices out to have all "
            "processes take part, or give each devices=jax.local_devices()."
        )
    return peers


def make_transport(placements: Sequence[Sharding], peers: Peers | None) -> Transport:
    """How values travel between these places."""
    return LocalTransport(len(placements)) if peers is None else RemoteTransport(placements, peers)
