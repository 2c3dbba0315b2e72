"""Small things about pytrees and their leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding


def leaf_names(tree: Any) -> tuple[str, ...]:
    """The path of each leaf of a pytree, such as ``"block_0/Dense_1/kernel"``.

    What the libraries add around the path (Linen's `params` collection, the `value` of an NNX
    variable) is left out.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [path[:-1] if _is_value(path) else path for path, _ in leaves]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    if all(name.startswith("params/") for name in names):
        names = [name.removeprefix("params/") for name in names]
    return tuple(names)


def _is_value(path: tuple[Any, ...]) -> bool:
    """Whether a path ends at the value of an NNX variable."""
    return bool(path) and path[-1] == jax.tree_util.GetAttrKey("value")


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype that JAX gives to `leaf`: an array, a number or a shape.

    Weak types are kept: a Python number takes on the dtype of what it meets.
    """
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        weak = isinstance(leaf, int | float | complex) and not isinstance(leaf, bool)
        leaf = np.asarray(leaf)
    else:
        weak = getattr(leaf, "weak_type", False)
    if is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, weak_type=weak)


def is_function(given: Any) -> bool:
    """Whether something is a function in the place of a pytree; a pytree may be callable, too."""
    return callable(given) and jax.tree.leaves(given) == [given]


def shapes_of(given: Any) -> Any:
    """The shapes of a pytree, or of what a function without arguments returns."""
    return jax.eval_shape(given if is_function(given) else lambda: given)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key."""
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def own_copy(leaf: Any) -> Any:
    """`leaf`, safe from later writes and on no more than one device.

    Host memory is copied; a jax.Array cannot be written to.
    """
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    sharding = leaf.sharding
    if isinstance(sharding, SingleDeviceSharding) or len(sharding.device_set) == 1:
        return leaf
    return jax.device_put(leaf, min(sharding.device_set, key=lambda device: device.id))


def place(leaf: Any, placement: Sharding) -> jax.Array:
    """A copy of `leaf` at `placement` that shares no memory with what the user holds."""
    return jax.device_put(own_copy(leaf), placement, may_alias=False)
