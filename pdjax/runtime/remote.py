"""Moves values between processes.

The sender offers its arrays under a number, and the receiver fetches them under it
(`jax.experimental.transfer`). Both return at once: what is fetched becomes ready when it has come,
and is fetched as soon as the program that reads it is dispatched, long before that runs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.experimental import transfer
from jax.sharding import Sharding

from pdjax.distributed import Peers
from pdjax.trees import is_key

_COUNT_BITS, _ENDPOINT_BITS = 24, 14
_runs = itertools.count()


class TransferTransport:
    """Between places of any processes.

    What crosses processes is numbered on each way from one place to another, in the same order on
    both sides.

    Args:
        placements: where each place is.
        peers: the processes.
    """

    def __init__(self, placements: Sequence[Sharding], peers: Peers) -> None:
        owners = [next(iter(placement.device_set)).process_index for placement in placements]
        self.here = tuple(owner == peers.process_id for owner in owners)
        # Beside the places every process has an end of its own, for what all processes get.
        self._owners = (*owners, *range(peers.num_processes))
        own = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        self._shardings = (*placements, *[own] * peers.num_processes)
        self._peers = peers
        self._process = peers.process_id
        self._end = len(owners)
        self._counts: Counter[tuple[int, int]] = Counter()
        # All processes make their transports in the same order.
        self._run = next(_runs) % 2 ** (63 - _COUNT_BITS - 2 * _ENDPOINT_BITS)
        self._server = _server(peers.address)
        self._addresses = peers.exchange("address for transfers", self._server.address())
        self._connections: dict[int, Any] = {}
        if len(self._owners) >= 2**_ENDPOINT_BITS:
            raise ValueError(
                f"{len(owners)} workers in {peers.num_processes} processes; there may be "
                f"{2**_ENDPOINT_BITS} together."
            )

    def move(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int, target: int
    ) -> Sequence[jax.Array] | None:
        """As `Transport.move`."""
        here, there = (self._owners[end] == self._process for end in (source, target))
        if here == there:  # nothing crosses processes, or between others
            return values
        number = self._counts[source, target]
        self._counts[source, target] = number + 1
        name = self._name(source, target, number)
        if there:
            return self._fetch(name, shapes, source, target)
        assert values is not None
        # What has no elements would never arrive.
        self._server.await_pull(name, [_raw(value) for value in values if value.size])
        return None

    def broadcast(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int
    ) -> Sequence[jax.Array]:
        """As `Transport.broadcast`."""
        found = values
        for process in range(len(self._owners) - self._end):
            moved = self.move(values, shapes, source, self._end + process)
            found = moved if found is None else found
        assert found is not None
        return found

    def meet(self) -> None:
        """As `Transport.meet`."""
        self._peers.exchange("everybody has what was sent", None)

    def _name(self, source: int, target: int, number: int) -> int:
        name = self._run
        for part in (source, target):
            name = name << _ENDPOINT_BITS | part
        return name << _COUNT_BITS | number % 2**_COUNT_BITS

    def _fetch(
        self, name: int, shapes: Sequence[Any], source: int, target: int
    ) -> Sequence[jax.Array]:
        process, sharding = self._owners[source], self._shardings[target]
        if process not in self._connections:
            self._connections[process] = self._server.connect(self._addresses[process])
        wanted = [_raw_shape(shape, sharding) for shape in shapes]
        found = iter(self._connections[process].pull(name, [s for s in wanted if s.size]))
        values = [next(found) if s.size else _empty(s) for s in wanted]
        return [_cooked(value, shape) for value, shape in zip(values, shapes, strict=True)]


@cache
def _server(address: str) -> Any:
    """The server of this process; there is one for all pipelines."""
    client = jax.local_devices()[0].client
    return transfer.start_transfer_server(client, f"{address}:0", [f"{address}:0"])


def _empty(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.zeros(shape.shape, shape.dtype), shape.sharding)


def _raw(value: jax.Array) -> jax.Array:
    """What travels in the place of a value: random keys as their numbers."""
    return jax.random.key_data(value) if is_key(value) else value


def _raw_shape(shape: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    if is_key(shape):
        shape = jax.eval_shape(jax.random.key_data, shape)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _cooked(value: jax.Array, shape: Any) -> jax.Array:
    """Undoes `_raw`."""
    return jax.random.wrap_key_data(value, impl=_impl_of(shape.dtype)) if is_key(shape) else value


@cache
def _impl_of(dtype: Any) -> str:
    """The name of the generator of random keys of a type; only keys, or tracers, tell it."""
    found: list[str] = []

    def look(key: jax.Array) -> None:
        found.append(str(jax.random.key_impl(key)))

    jax.eval_shape(look, jax.ShapeDtypeStruct((), dtype))
    return found[0]
