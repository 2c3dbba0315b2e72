"""A parameter of a traced loss function: a leaf of the user's pytree, or a range of one.

All that places, names and counts parameters works with positions in `TracedLoss.params`. That the
parameter at a position is a whole leaf is said here only, and here is the way from the user's
leaves to parameters (`LeafRange.of`) and back (`join`):

    leaf 0   ["w"]      f32[6, 8, 8]     position 0   leaf 0, axis 0, 0:3   "w[0:3]"
                                         position 1   leaf 0, axis 0, 3:6   "w[3:6]"
    leaf 1   ["head"]   f32[8, 3]        position 2   leaf 1                "head"

Today every parameter is a whole leaf. A loop over stacked layers that is cut between two of them
will need ranges: each of its stages then holds its layers' slice of every stacked leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class LeafRange:
    """A leaf, or the elements from `start` to `stop` along one of its axes.

    Attributes:
        leaf: position of the leaf in the user's pytree.
        axis: the axis along which the leaf is divided; None for the whole leaf.
        start: first element along the axis.
        stop: element after the last one; None for the whole leaf.

    Raises:
        ValueError: if the range is empty, or only half of it is given.
    """

    leaf: int
    axis: int | None = None
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.axis is None and (self.start, self.stop) == (0, None):
            return
        if self.axis is None or self.stop is None or not 0 <= self.start < self.stop:
            raise ValueError(
                f"leaf {self.leaf} along axis {self.axis} from {self.start} to {self.stop}: "
                "expected an axis and a range with 0 <= start < stop, or none of them."
            )

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole leaf."""
        return self.axis is None

    def name(self, path: str) -> str:
        """The name of the parameter, such as ``"blocks/w[3:7]"``, from the path of its leaf."""
        if self.axis is None:
            return path
        return f"{path}[{':, ' * self.axis}{self.start}:{self.stop}]"

    def of(self, value: Any) -> Any:
        """The range of `value`, an array of the leaf's shape: a view of a NumPy array."""
        if self.axis is None:
            return value
        return value[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


def whole_leaves(count: int) -> tuple[LeafRange, ...]:
    """One range for each of `count` leaves, all of it."""
    return tuple(map(LeafRange, range(count)))


def join(ranges: Sequence[LeafRange], values: Sequence[Any]) -> list[Any]:
    """The whole leaves, in order, from the values of their ranges.

    Args:
        ranges: the ranges of all leaves, each leaf's together and ascending.
        values: an array for each range.

    Raises:
        ValueError: if a range does not begin where the one before it ends, along the same axis.
    """
    pairs: dict[int, list[tuple[LeafRange, Any]]] = {}
    for part, value in zip(ranges, values, strict=True):
        pairs.setdefault(part.leaf, []).append((part, value))
    return [_joined(*zip(*pairs[leaf], strict=True)) for leaf in sorted(pairs)]


def _joined(ranges: Sequence[LeafRange], values: Sequence[Any]) -> Any:
    """One leaf of its ranges; a single one is returned as it is, and NumPy's stay in NumPy."""
    axis, end = ranges[0].axis, 0
    for part in ranges:
        if part.start != end or part.axis != axis:
            raise ValueError(f"{part} does not begin at {end} along axis {axis}: {list(ranges)}")
        end = part.stop
    if axis is None or len(values) == 1:
        return values[0]
    on_host = all(isinstance(value, np.ndarray) for value in values)
    return (np if on_host else jnp).concatenate(values, axis)
