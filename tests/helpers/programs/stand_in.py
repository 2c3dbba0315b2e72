"""Stands in for `jax.device_put` between processes, which CPU devices do not support.

Keeps to its contract, and moves the arrays in another way: sender and receiver both call it, in the
same order, the receiver with arrays that it has no part of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import transfer
from jax.sharding import Sharding

from pdjax.communication import p2p
from pdjax.distributed import Peers

calls: Counter[str] = Counter()
_put = jax.device_put


def install(peers: Peers) -> None:
    """From now on `jax.device_put` reaches the devices of other processes, and is known to."""
    host = f"{peers.address}:0"
    server = transfer.start_transfer_server(jax.local_devices()[0].client, host, [host])
    addresses = peers.exchange("addresses of the stand-in", server.address())
    connections = [server.connect(address) for address in addresses]

    def put(values: Any, target: Any = None, **options: Any) -> Any:
        if not isinstance(target, Sharding) or not _crosses(values, target):
            return _put(values, target, **options)
        assert not options
        (source,), (goal,) = values[0].devices(), target.device_set
        assert all(x.committed and x.devices() == {source} and x.size for x in values)
        name = calls["sent"] + calls["received"]
        if source.process_index == peers.process_id:
            calls["sent"] += 1
            server.await_pull(name, values)
            return None
        calls["received"] += 1
        assert goal.process_index == peers.process_id, "neither sends nor receives"
        assert not any(x.addressable_shards for x in values)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target) for x in values]
        return connections[source.process_index].pull(name, shapes)

    jax.device_put = put  # type: ignore[assignment]
    p2p._can_put = lambda: True


def _crosses(values: Any, target: Sharding) -> bool:
    if not isinstance(values, Sequence) or not all(isinstance(x, jax.Array) for x in values):
        return False
    return not (target.is_fully_addressable and all(x.is_fully_addressable for x in values))
