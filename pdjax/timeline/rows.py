"""Many entries of one kind, such as the spans of a timeline, kept as columns.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar, overload

import numpy as np

Entry = TypeVar("Entry", bound=NamedTuple, covariant=True)


class Rows(Sequence[Entry], Generic[Entry]):
    """A sequence of named tuples that are made when they are first asked for.

    Half a million of them take a second to make, their columns some milliseconds, and most figures
    need nothing but columns. It equals the tuple of its entries.

    Example:
        >>> class Point(NamedTuple):
        ...     x: int
        ...     y: int
        >>> rows = Rows(Point, {"x": np.array([1, 2]), "y": np.array([3, 4])})
        >>> rows[1], len(rows)
        (Point(x=2, y=4), 2)

    Attributes:
        kind: what the entries are.
        columns: for each field of an entry its values, of all entries.
    """

    def __init__(self, kind: type[Entry], columns: Mapping[str, np.ndarray]) -> None:
        assert tuple(columns) == kind._fields, "a column for each field, in their order"
        self.kind = kind
        self.columns = columns

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The entries."""
        lists = [column.tolist() for column in self.columns.values()]
        return tuple(map(self.kind._make, zip(*lists, strict=True)))

    def __len__(self) -> int:
        return len(self.columns[self.kind._fields[0]])

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, index: int | slice) -> Entry | tuple[Entry, ...]:
        return self.entries[index]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __eq__(self, other: object) -> bool:
        return self.entries == (other.entries if isinstance(other, Rows) else other)

    def __hash__(self) -> int:
        return hash(self.entries)

    def __repr__(self) -> str:
        return repr(self.entries)


def column(entries: Sequence[NamedTuple], name: str) -> np.ndarray:
    """One field of all entries."""
    if isinstance(entries, Rows):
        return entries.columns[name]
    return np.array([getattr(entry, name) for entry in entries])
