"""How a value gets from one stage to another.

The executor hands every value that a stage sends to a `Transport`, and passes on what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax


class Transport(Protocol):
    """Moves arrays between stages. Must not wait for the arrays to be ready."""

    def send(self, values: Sequence[jax.Array], source: int, target: int) -> Sequence[jax.Array]:
        """Returns `values` as the programs of stage `target` may read them."""
        ...


class LocalTransport:
    """Between devices of one process: the reading program moves its inputs itself.

    A jitted function that declares the sharding of its inputs accepts an array of another device
    and moves it inside the call, which costs the host a fifth of a `jax.device_put`.
    """

    def send(self, values: Sequence[jax.Array], source: int, target: int) -> Sequence[jax.Array]:
        """Returns `values` as they are."""
        del source, target
        return values
