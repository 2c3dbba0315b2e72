"""How a value gets from one replica of a stage to another.

The executor runs its instructions in one order in all processes, and hands every value that one
replica sends to another to a `Transport`, which knows which replicas are in this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax


class Transport(Protocol):
    """Moves arrays between replicas. Must not wait for the arrays to be ready.

    Every process must call `send_recv` and `broadcast` for the same values in the same order, also
    for those that it neither has nor gets; it may leave out calls that concern other processes
    only. What is moved must not be donated before it has arrived (see `barrier`).

    Attributes:
        is_local: for each replica whether this process runs it.
    """

    @property
    def is_local(self) -> Sequence[bool]:
        """See above."""
        ...

    def send_recv(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int, target: int
    ) -> Sequence[jax.Array] | None:
        """Brings values from one replica to another.

        Args:
            values: the values; None if `source` is in another process.
            shapes: their shapes.
            source: the replica that has them.
            target: the replica that needs them.

        Returns:
            The values as the programs of `target` may read them; None if that is in another
            process.
        """
        ...

    def broadcast(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int
    ) -> Sequence[jax.Array]:
        """Brings values from one replica to every process.

        Args:
            values: the values; None if `source` is in another process.
            shapes: their shapes.
            source: the replica that has them.

        Returns:
            The values, on a device of this process.
        """
        ...

    def barrier(self) -> None:
        """Waits until every process is here, and so has what it has waited for before."""
        ...


class LocalTransport:
    """Between devices of one process: the reading program moves its inputs itself.

    A jitted function that declares the sharding of its inputs accepts an array of another device
    and moves it inside the call, which costs the host a fifth of a `jax.device_put`.
    """

    def __init__(self, num_replicas: int) -> None:
        self.is_local = (True,) * num_replicas

    def send_recv(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int, target: int
    ) -> Sequence[jax.Array] | None:
        """Returns `values` as they are."""
        del shapes, source, target
        return values

    def broadcast(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int
    ) -> Sequence[jax.Array]:
        """Returns `values` as they are."""
        del shapes, source
        assert values is not None, "all replicas are local"
        return values

    def barrier(self) -> None:
        """Returns: there is no other process."""


class Renumbered:
    """A transport for some of the replicas, by other numbers.

    Args:
        transport: of all replicas.
        replicas: for each new number the old one.
    """

    def __init__(self, transport: Transport, replicas: Sequence[int]) -> None:
        self._transport = transport
        self._replicas = replicas
        self.is_local = tuple(transport.is_local[replica] for replica in replicas)

    def send_recv(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int, target: int
    ) -> Sequence[jax.Array] | None:
        """As `Transport.send_recv`."""
        old = self._replicas
        return self._transport.send_recv(values, shapes, old[source], old[target])

    def broadcast(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int
    ) -> Sequence[jax.Array]:
        """As `Transport.broadcast`."""
        return self._transport.broadcast(values, shapes, self._replicas[source])

    def barrier(self) -> None:
        """As `Transport.barrier`."""
        self._transport.barrier()
