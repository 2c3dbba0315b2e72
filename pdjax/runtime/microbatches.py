"""Divides minibatches into microbatches, on the devices of the stages that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Sharding

from pdjax.trace.jit import Values, jit_on


@dataclass(frozen=True)
class Slicing:
    """How a minibatch divides into microbatches.

    Attributes:
        num_microbatches: microbatches in a minibatch.
        axes: for each batch leaf its batch axis, or None if every microbatch gets it whole.
    """

    num_microbatches: int
    axes: tuple[int | None, ...]


class MicrobatchSlicer:
    """Brings batch leaves to one stage, each microbatch's part by itself.

    What it returns is its own: written memory of the host is not looked at again, and an array
    that the caller gives away later is not needed any more.

    Args:
        placement: where the stage is.
        keeps_in_place: whether arrays that are there already may be used as they are. Their owner
            must then keep them until the stage has read them.
    """

    def __init__(self, placement: Sharding, *, keeps_in_place: bool) -> None:
        self._placement = placement
        self._keeps_in_place = keeps_in_place
        self._divide = jit_on(_divide, placement, static=(0, 1, 2))

    def slice(
        self,
        leaves: Sequence[Any],
        indices: Sequence[int],
        slicing: Slicing,
        turns: range | None = None,
    ) -> list[Any]:
        """For each microbatch its part of the leaves at `indices`.

        Args:
            leaves: the leaves of the minibatch.
            indices: those that are wanted.
            slicing: how they divide.
            turns: the microbatches that are wanted; all if None. Of the others there is nothing.
        """
        count = slicing.num_microbatches
        wanted = tuple(range(count) if turns is None else turns)
        chosen = [leaves[i] for i in indices]
        axes = tuple(slicing.axes[i] for i in indices)
        if not chosen or not wanted:
            return [()] * count
        if count == 1 and self._keeps_in_place and all(map(self._is_in_place, chosen)):
            return [tuple(chosen)]
        whole, parts = self._divide(count, axes, wanted, *chosen)
        found: list[Any] = [None] * count
        for index, part in zip(wanted, parts, strict=True):
            found[index] = _merge(axes, whole, part) if whole else part
        return found

    def _is_in_place(self, leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and leaf.sharding == self._placement


def _divide(
    count: int, axes: tuple[int | None, ...], wanted: tuple[int, ...], *leaves: Any
) -> tuple[Values, list[Values]]:
    """The leaves without a batch axis, and for each microbatch wanted its part of the others."""
    whole = tuple(leaf for leaf, axis in zip(leaves, axes, strict=True) if axis is None)

    def part(leaf: Any, axis: int, index: int) -> Any:
        size = leaf.shape[axis] // count
        return jax.lax.slice_in_dim(leaf, index * size, (index + 1) * size, axis=axis)

    parts = [
        tuple(
            part(leaf, axis, index)
            for leaf, axis in zip(leaves, axes, strict=True)
            if axis is not None
        )
        for index in wanted
    ]
    return whole, parts


def _merge(axes: Sequence[int | None], whole: Values, part: Values) -> Values:
    from_whole, from_part = iter(whole), iter(part)
    return tuple(next(from_whole) if axis is None else next(from_part) for axis in axes)
