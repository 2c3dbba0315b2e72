"""Where the leaves that a person handed over came from, and so where their copies go back to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from pdjax.trees import is_function, is_key, shapes_of


@dataclass(frozen=True)
class Origin:
    """Where a leaf came from, and so where a copy of it goes.

    Attributes:
        sharding: of an array that is committed to it.
        device: of any other jax.Array; None for numpy arrays and numbers.
    """

    sharding: Sharding | None = None
    device: Any = None

    @classmethod
    def of(cls, leaf: Any) -> Origin:
        """Where `leaf` is."""
        if not isinstance(leaf, jax.Array):
            return cls()
        if leaf.committed:
            return cls(sharding=leaf.sharding)
        return cls(device=next(iter(leaf.sharding.device_set)))

    def bring_back(self, value: jax.Array) -> Any:
        """A copy of `value` in the place that the leaf came from."""
        if is_key(value):
            return jax.device_put(value, self.sharding or self.device, may_alias=False)
        host = np.array(value)
        if self.sharding is not None:
            return jax.device_put(host, self.sharding)
        if self.device is None:
            return host
        with jax.default_device(self.device):
            return jnp.array(host)


def gather(origins: Any, values: Iterable[jax.Array]) -> Any:
    """Copies of `values`, one for each leaf, in the structure of `origins`."""
    leaves, tree = jax.tree.flatten(origins)
    pairs = zip(leaves, values, strict=True)
    return jax.tree.unflatten(tree, [leaf.bring_back(value) for leaf, value in pairs])


def origins_of(given: Any) -> Any:
    """Where each leaf of a pytree came from; what a function makes is copied to the host."""
    if is_function(given):
        return jax.tree.map(lambda _: Origin(), shapes_of(given))
    return jax.tree.map(Origin.of, given)
