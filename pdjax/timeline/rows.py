"""Many entries of one kind, such as the spans of a timeline, kept as columns.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Generic, NamedTuple, Self, TypeVar, overload

import numpy as np

from pdjax.column_table import ColumnTable

Entry = TypeVar("Entry", bound=NamedTuple)


class Rows(ColumnTable, Sequence[Entry], Generic[Entry]):
    """A sequence of named tuples that are made when they are first asked for.

    Half a million of them take a second to make, their columns some milliseconds, and most figures
    need nothing but columns. It equals the tuple of its entries.

    Example:
        >>> class Point(NamedTuple):
        ...     x: int
        ...     y: int
        >>> rows = Rows.of(Point, np.array([1, 2]), np.array([3, 4]))
        >>> rows[1], len(rows)
        (Point(x=2, y=4), 2)

    Attributes:
        kind: what the entries are.
    """

    def __init__(self, kind: type[Entry], columns: Mapping[str, np.ndarray]) -> None:
        assert tuple(columns) == kind._fields, "a column for each field, in their order"
        self.kind = kind
        self._columns = columns

    @classmethod
    def of(cls, kind: type[Entry], *columns: np.ndarray) -> Self:
        """Rows of a kind, from a column for each of its fields."""
        return cls(kind, dict(zip(kind._fields, columns, strict=True)))

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """For each field of an entry its values, of all entries."""
        return self._columns

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> Self:
        """The same kind of rows with other values."""
        return type(self)(self.kind, columns)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The entries."""
        return tuple(map(self.kind._make, self.tuples()))

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
