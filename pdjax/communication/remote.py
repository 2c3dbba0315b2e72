"""Moves values between processes, whatever they are: over a backend that knows arrays only."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter, deque
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from pdjax.communication.p2p import Endpoint, Tag, find_backend
from pdjax.distributed import Peers
from pdjax.trees import is_key

_runs = itertools.count()


class Arrivals:
    """What was asked for and has perhaps not come.

    No process may end before it has all that: those who send it would, and what a client of JAX
    does with arrays that are on their way when it is torn down ends in a crash.
    """

    def __init__(self) -> None:
        self._expected: deque[jax.Array] = deque()

    def add(self, values: Sequence[jax.Array]) -> None:
        """Notes what was asked for; forgets what has come, up to the first that has not."""
        while self._expected and _has_come(self._expected[0]):
            self._expected.popleft()
        self._expected.extend(values)

    def wait(self) -> None:
        """Returns when everything has come."""
        expected, self._expected = self._expected, deque()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # others will say what is lost
            jax.block_until_ready([value for value in expected if not value.is_deleted()])


def _has_come(value: jax.Array) -> bool:
    # Every array has it; the type that JAX publishes does not name it.
    return value.is_deleted() or value.is_ready()  # pyright: ignore[reportAttributeAccessIssue]


_arrivals = Arrivals()


class RemoteTransport:
    """Between replicas of any processes.

    What crosses processes is numbered for each pair of replicas, in the same order on
    both sides.

    Args:
        placements: where each replica is.
        peers: the processes.
    """

    def __init__(self, placements: Sequence[Sharding], peers: Peers) -> None:
        owners = [next(iter(placement.device_set)).process_index for placement in placements]
        self.is_local = tuple(owner == peers.process_id for owner in owners)
        # Beside the replicas every process has an endpoint of its own, for what all processes get.
        self._endpoints = (
            *itertools.starmap(Endpoint, zip(owners, placements, strict=True)),
            *(Endpoint(process, _first_of(process)) for process in range(peers.num_processes)),
        )
        self._first_process = len(owners)
        self._peers = peers
        self._counts: Counter[tuple[int, int]] = Counter()
        # All processes make their transports in the same order.
        self._backend = find_backend(self._endpoints, peers, next(_runs))
        peers.finish_first(_arrivals.wait)

    def send_recv(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int, target: int
    ) -> Sequence[jax.Array] | None:
        """As `Transport.send_recv`."""
        own = self._peers.process_id
        sends, receives = (self._endpoints[at].process == own for at in (source, target))
        if sends == receives:  # nothing crosses processes, or between others
            return values
        tag = Tag(source, target, self._counts[source, target])
        self._counts[source, target] += 1
        if receives:
            return self._receive(shapes, tag)
        assert values is not None
        sent = [_raw(value) for value in values if value.size]  # others would never arrive
        if sent:
            self._backend.send(sent, tag)
        return None

    def broadcast(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int
    ) -> Sequence[jax.Array]:
        """As `Transport.broadcast`."""
        found = values
        for endpoint in range(self._first_process, len(self._endpoints)):
            moved = self.send_recv(values, shapes, source, endpoint)
            found = moved if found is None else found
        assert found is not None
        return found

    def barrier(self) -> None:
        """As `Transport.barrier`."""
        self._peers.exchange("everybody has what was sent", None)

    def _receive(self, shapes: Sequence[Any], tag: Tag) -> Sequence[jax.Array]:
        wanted = [_raw_shape(shape) for shape in shapes]
        sent = [shape for shape in wanted if shape.size]
        received = self._backend.receive(sent, tag) if sent else []
        _arrivals.add(received)
        found = iter(received)
        sharding = self._endpoints[tag.target].sharding
        values = [next(found) if s.size else _empty(s, sharding) for s in wanted]
        return [_cooked(value, shape) for value, shape in zip(values, shapes, strict=True)]


def _first_of(process: int) -> Sharding:
    device = next(d for d in jax.devices() if d.process_index == process)
    return SingleDeviceSharding(device)


def _empty(shape: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    return jax.device_put(np.zeros(shape.shape, shape.dtype), sharding)


def _raw(value: jax.Array) -> jax.Array:
    """What travels in the place of a value: random keys as their numbers."""
    return jax.random.key_data(value) if is_key(value) else value


def _raw_shape(shape: Any) -> jax.ShapeDtypeStruct:
    if is_key(shape):
        shape = jax.eval_shape(jax.random.key_data, shape)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype)


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
