"""Minibatches: their structure, their batch axes, and how they divide into microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pdjax.trees import leaf_names, shape_of

Shapes = tuple[jax.ShapeDtypeStruct, ...]


@dataclass(frozen=True)
class BatchSpec:
    """What a minibatch looks like.

    Attributes:
        tree: its structure.
        names: the path of each leaf.
        shapes: the shape and dtype of each leaf.
        axes: the batch axis of each leaf; None for a leaf that every microbatch gets whole.
        size: the number of examples.
    """

    tree: Any
    names: tuple[str, ...]
    shapes: Shapes
    axes: tuple[int | None, ...]
    size: int

    def __str__(self) -> str:
        pairs = zip(self.names, self.shapes, strict=True)
        return ", ".join(
            f"{name or 'batch'} {shape.dtype}{list(shape.shape)}" for name, shape in pairs
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for minibatches that the same compiled programs serve."""
        return tuple((shape.shape, str(shape.dtype), shape.weak_type) for shape in self.shapes)

    def microbatch(self, num_microbatches: int) -> Any:
        """The shapes of one of `num_microbatches` microbatches, in the batch's structure.

        Raises:
            ValueError: if the examples do not divide evenly.
        """
        check_divisible(self.size, num_microbatches)
        leaves = []
        for shape, axis in zip(self.shapes, self.axes, strict=True):
            dims = list(shape.shape)
            if axis is not None:
                dims[axis] //= num_microbatches
            leaves.append(shape.update(shape=tuple(dims)))
        return jax.tree.unflatten(self.tree, leaves)

    def first_microbatch(self, batch: Any, num_microbatches: int) -> Any:
        """The first microbatch of a minibatch; None if that has shapes in the place of arrays."""
        leaves = jax.tree.leaves(batch)
        if not all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves):
            return None
        parts = []
        for leaf, axis in zip(leaves, self.axes, strict=True):
            before = (slice(None),) * (axis or 0)
            part = slice(leaf.shape[axis] // num_microbatches) if axis is not None else ...
            parts.append(leaf[(*before, part)])
        return jax.tree.unflatten(self.tree, parts)


def appearance(leaf: Any) -> Any:
    """Equal for leaves that have the same shape and dtype, and quicker to make than these."""
    if not hasattr(leaf, "dtype"):
        return type(leaf), np.shape(leaf)
    return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)


def check_divisible(size: int, num_microbatches: int) -> None:
    """Raises ValueError if `size` examples do not make `num_microbatches` equal microbatches."""
    if size % num_microbatches:
        divisors = [k for k in range(1, size + 1) if size % k == 0]
        nearest = min(divisors, key=lambda k: abs(k - num_microbatches))
        raise ValueError(
            f"a minibatch of {size} examples does not divide into num_microbatches="
            f"{num_microbatches} equal parts. Use a batch size that is a multiple of "
            f"{num_microbatches}, or num_microbatches={nearest}."
        )


def default_num_microbatches(size: int, num_workers: int) -> int:
    """The largest divisor of `size` up to four a worker (GPipe's advice); 1 for one worker."""
    most = 4 * num_workers if num_workers > 1 else 1
    return max(k for k in range(1, most + 1) if size % k == 0)


def describe_batch(batch: Any, batch_axes: Any) -> BatchSpec:
    """Reads the shapes of `batch`.

    Args:
        batch: pytree of arrays or shapes.
        batch_axes: the axis that counts the examples: a number for all leaves, or a pytree of
            numbers and None that is a prefix of `batch`.

    Raises:
        ValueError: if a leaf lacks its batch axis, or the leaves disagree about the number of
            examples.
    """
    leaves, tree = jax.tree.flatten(batch)
    names = leaf_names(batch)
    shapes = tuple(shape_of(leaf) for leaf in leaves)
    axes = _broadcast_axes(batch_axes, batch)
    sizes = {}
    for name, shape, axis in zip(names, shapes, axes, strict=True):
        if axis is not None:
            if not -len(shape.shape) <= axis < len(shape.shape):
                raise ValueError(
                    f"batch leaf {name!r} of shape {shape.shape} has no axis {axis}. If every "
                    "microbatch should get it whole, say so: batch_axes={...: None} for this leaf."
                )
            sizes[name] = shape.shape[axis]
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"the batch leaves disagree about the number of examples: {sizes or 'none has any'}. "
            "Expected one number along batch_axes; a leaf that every microbatch should get "
            "whole has the batch axis None."
        )
    positive = tuple(
        axis if axis is None else axis % len(shape.shape)
        for axis, shape in zip(axes, shapes, strict=True)
    )
    return BatchSpec(tree, names, shapes, positive, next(iter(sizes.values())))


def check_structure(spec: BatchSpec, expected: BatchSpec) -> None:
    """Raises ValueError if a batch is not built like the one that `Pipeline.init` saw."""
    if spec.tree == expected.tree:
        return
    missing = sorted(set(expected.names) - set(spec.names))
    extra = sorted(set(spec.names) - set(expected.names))
    raise ValueError(
        f"the batch has another structure than the one given to init: missing {missing}, "
        f"unexpected {extra}; got {spec.tree}, expected {expected.tree}. Hand over batches of "
        "one structure, or make another Pipeline."
    )


def _broadcast_axes(batch_axes: Any, batch: Any) -> tuple[int | None, ...]:
    axes: list[int | None] = []

    def spread(axis: int | None, part: Any) -> None:
        axes.extend([axis] * len(jax.tree.leaves(part)))

    try:
        jax.tree.map(spread, batch_axes, batch, is_leaf=lambda axis: axis is None)
    except ValueError as error:
        raise ValueError(
            f"batch_axes {batch_axes} does not fit a batch of structure "
            f"{jax.tree.structure(batch)}: {error}"
        ) from error
    return tuple(axes)


def concatenation_axes(
    micro: Sequence[Any], whole: Sequence[Any], num_microbatches: int
) -> tuple[int | None, ...]:
    """For each result, the axis along which it grows with the batch, if there is one.

    Args:
        micro: the shapes of the results for one microbatch.
        whole: their shapes for a minibatch.
        num_microbatches: how many microbatches the minibatch has.
    """

    def axis_of(small: tuple[int, ...], large: tuple[int, ...]) -> int | None:
        if len(small) != len(large) or num_microbatches == 1:
            return None
        grown = [at for at, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
        if len(grown) == 1 and large[grown[0]] == small[grown[0]] * num_microbatches:
            return grown[0]
        return None

    return tuple(axis_of(a.shape, b.shape) for a, b in zip(micro, whole, strict=True))
