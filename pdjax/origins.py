"""Where the leaves that a person handed over came from, and so where their copies go back to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from pdjax.trees import is_key


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


def gather(origins: Any, values: Mapping[int, Any]) -> Any:
    """Copies of `values`, which go by the index of the leaf, in the structure of `origins`."""
    leaves, tree = jax.tree.flatten(origins)
    for value in values.values():
        if not is_key(value):
            value.copy_to_host_async()
    return jax.tree.unflatten(tree, [leaf.bring_back(values[i]) for i, leaf in enumerate(leaves)])
