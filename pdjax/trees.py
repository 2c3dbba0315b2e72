"""Small things about pytrees and their leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding


def leaf_names(tree: Any) -> tuple[str, ...]:
    """The path of each leaf of a pytree, such as ``"block_0/Dense_1/kernel"``.

    What the libraries add around the path (Linen's `params` collection, the `value` of an NNX
    variable) is left out.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if all(name.startswith("params/") for name in names):
        names = [name.removeprefix("params/") for name in names]
    return tuple(name.removesuffix("/value") for name in names)


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype that JAX gives to `leaf`: an array, a number or a shape."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    if is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key."""
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def own_copy(leaf: Any) -> Any:
    """`leaf`, safe from later writes: host memory is copied, a jax.Array cannot be written to."""
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def place(leaf: Any, placement: Sharding) -> jax.Array:
    """A copy of `leaf` at `placement` that shares no memory with what the user holds."""
    return jax.device_put(own_copy(leaf), placement, may_alias=False)
