"""Jitted functions of one placement, and the sums that they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
from jax.sharding import Sharding

Values = tuple[Any, ...]
"""Arrays, or their tracers."""


def jit_on(
    function: Callable[..., Any],
    placement: Sharding,
    donate: tuple[int, ...] = (),
    static: tuple[int, ...] = (),
) -> Any:
    """`jax.jit` of a function that moves its inputs to a placement and leaves its outputs there.

    Args:
        function: any function of arrays.
        placement: where it runs.
        donate: positions of the arguments whose buffers it may reuse.
        static: positions of the arguments that are no arrays.
    """
    return jax.jit(
        function,
        in_shardings=placement,
        out_shardings=placement,
        donate_argnums=donate,
        static_argnums=static,
    )


def total(parts: Sequence[Any]) -> Any:
    """The sum of `parts` from several stages, in the order given; one part is its own sum."""
    return reduce(lambda sum_so_far, part: sum_so_far + part, parts)


def accumulate(sums: Values | None, new: Values) -> Values:
    """`sums` with `new` added one by one; `new` itself where there is none yet."""
    if sums is None:
        return new
    pairs = zip(sums, new, strict=True)
    return tuple(more if old is None else old + more for old, more in pairs)
