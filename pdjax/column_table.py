"""Many entries of one kind, kept as one NumPy array for each field.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Self, cast

import numpy as np


class ColumnTable:
    """The base of tables whose columns are NumPy arrays of equal length.

    A subclass is a frozen dataclass. Its array fields are the columns, all other fields belong to
    the table as a whole.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, eq=False)
        ... class Points(ColumnTable):
        ...     x: np.ndarray
        ...     y: np.ndarray
        ...     unit: str = "m"
        >>> points = Points(np.array([3, 1, 2]), np.array([4, 5, 6]))
        >>> len(points), list(points.sorted_by("x").tuples())
        (3, [(1, 5), (2, 6), (3, 4)])
    """

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """The columns by name, in order."""
        found = {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}
        return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> Self:
        """The same table with other columns of the same names."""
        return replace(cast(Any, self), **columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, index: np.ndarray) -> Self:
        """The rows at some positions, or those that a mask of booleans marks."""
        return self.with_columns({name: each[index] for name, each in self.columns.items()})

    def sorted_by(self, name: str) -> Self:
        """The rows in the order of one column; equal ones stay in their order."""
        return self.take(np.argsort(self.columns[name], kind="stable"))

    @classmethod
    def concatenate(cls, tables: Sequence[Self]) -> Self:
        """The rows of at least one table, one table after the other."""
        first, columns = tables[0], [table.columns for table in tables]
        return first.with_columns(
            {name: np.concatenate([each[name] for each in columns]) for name in first.columns}
        )

    def tuples(self) -> Iterator[tuple[Any, ...]]:
        """The rows as tuples of Python's values."""
        return zip(*(column.tolist() for column in self.columns.values()), strict=True)
