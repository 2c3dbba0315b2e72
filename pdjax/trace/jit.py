"""Jitted functions that live in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
from jax.sharding import Sharding

Values = tuple[Any, ...]
"""Arrays, or what stands for them in a trace."""


def jit_on(
    function: Callable[..., Any],
    placement: Sharding,
    donate: tuple[int, ...] = (),
    static: tuple[int, ...] = (),
) -> Any:
    """`jax.jit` of a function that fetches its inputs to a place and leaves its outputs there."""
    return jax.jit(
        function,
        in_shardings=placement,
        out_shardings=placement,
        donate_argnums=donate,
        static_argnums=static,
    )


def total(parts: Sequence[Any]) -> Any:
    """The sum of what several stages send, in the order given; of one part the part itself."""
    return reduce(lambda sum_so_far, part: sum_so_far + part, parts)


def accumulate(sums: Values | None, new: Values) -> Values:
    """`sums` with `new` added one by one; `new` itself where there is none yet."""
    if sums is None:
        return new
    pairs = zip(sums, new, strict=True)
    return tuple(more if old is None else old + more for old, more in pairs)
