"""Compiled programs by batch shape, no more than a number of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

DEFAULT_BOUND = 16
"""Batch shapes whose programs are kept, unless told otherwise."""

Made = TypeVar("Made")


class ProgramCache(Generic[Made]):
    """Keeps what was compiled for the shapes that were used last.

    The first shape stays: a pipeline was made for it. Of the others the least recently used one is
    dropped when there are too many; programs that microbatches in flight still need live as long
    as these.

    Example:
        >>> cache = ProgramCache[str](bound=2)
        >>> [cache.get(key, lambda: key.upper()) for key in ("a", "b", "c", "b")]
        ['A', 'B', 'C', 'B']
        >>> list(cache), cache.num_recompilations
        (['a', 'b'], 1)

    Args:
        bound: how many are kept at the most.

    Attributes:
        num_recompilations: how often something was made again that had been dropped.

    Raises:
        ValueError: if the bound is less than one.
    """

    def __init__(self, bound: int = DEFAULT_BOUND) -> None:
        if bound < 1:
            raise ValueError(f"{bound} batch shapes are to be kept; expected at least 1.")
        self._bound = bound
        self._kept: OrderedDict[Hashable, Made] = OrderedDict()
        self._dropped: set[int] = set()  # hashes: the keys themselves may be large
        self.num_recompilations = 0

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What is kept for `key`, or what `make` makes of it now."""
        if key in self._kept:
            self._touch(key)
            return self._kept[key]
        made = make()
        self.num_recompilations += hash(key) in self._dropped
        self._kept[key] = made
        if len(self._kept) > self._bound:
            self._drop()
        return made

    def _touch(self, key: Hashable) -> None:
        """Makes a key the one used last; the first one keeps its place."""
        if key != next(iter(self._kept)):
            self._kept.move_to_end(key)

    def _drop(self) -> None:
        keys = iter(self._kept)
        first = next(keys)
        oldest = next(keys) if self._bound > 1 else first
        del self._kept[oldest]
        self._dropped.add(hash(oldest))
