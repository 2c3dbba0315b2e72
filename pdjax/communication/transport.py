"""How a value gets from one place to another.

The executor walks the same instructions in every process, and hands every value that one place
sends to another one to a `Transport`, which knows which places are in this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax


class Transport(Protocol):
    """Moves arrays between places. Must not wait for the arrays to be ready.

    Every process must call `move` and `broadcast` for the same values in the same order, also for
    those that it neither has nor gets; it may leave out calls that concern other processes only.
    What is moved must not be donated before it has arrived (see `meet`).

    Attributes:
        here: for each place whether this process runs it.
    """

    @property
    def here(self) -> Sequence[bool]:
        """See above."""
        ...

    def move(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int, target: int
    ) -> Sequence[jax.Array] | None:
        """Brings values from one place to another.

        Args:
            values: the values; None if `source` is not here.
            shapes: their shapes.
            source: the place where they are.
            target: the place where they are wanted.

        Returns:
            The values as the programs of place `target` may read them; None if that is not here.
        """
        ...

    def broadcast(
        self, values: Sequence[jax.Array] | None, shapes: Sequence[Any], source: int
    ) -> Sequence[jax.Array]:
        """Brings values from one place to every process.

        Args:
            values: the values; None if `source` is not here.
            shapes: their shapes.
            source: the place where they are.

        Returns:
            The values, on a device of this process.
        """
        ...

    def meet(self) -> None:
        """Waits until every process is here, and so has what it has waited for before."""
        ...


class LocalTransport:
    """Between devices of one process: the reading program moves its inputs itself.

    A jitted function that declares the sharding of its inputs accepts an array of another device
    and moves it inside the call, which costs the host a fifth of a `jax.device_put`.
    """

    def __init__(self, num_places: int) -> None:
        self.here = (True,) * num_places

    def move(
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
        assert values is not None, "all places are here"
        return values

    def meet(self) -> None:
        """Returns: there is no other process."""
