"""A minibatch's loss and metrics out of those of its microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from pdjax.runtime.placed import Values
from pdjax.trees import is_key

Merge = int | Literal["combine", "same"]
"""How the metrics of microbatches become one: concatenated along an axis, combined into a mean or
a sum, or all the same."""


def mean_of_results(
    num_microbatches: int,
    weighted: bool,
    merges: Sequence[Merge],
    placement: Sharding,
) -> Any:
    """The function that makes a minibatch's results out of its microbatches'.

    It takes a tuple of results (loss, weight if `weighted`, metrics) for each microbatch and
    returns ``(loss, weight, metrics)``. Metrics that are to be combined are averaged (by weight),
    but integers summed; of random keys the last one is taken.
    """

    def combine(results: Sequence[Values]) -> tuple[Any, Any, Values]:
        losses = jnp.stack([result[0] for result in results])
        if weighted:
            weights = jnp.stack([result[1] for result in results])
        else:
            weights = jnp.ones(num_microbatches, jnp.promote_types(losses.dtype, jnp.float32))
        total = weights.sum()
        loss = (losses if weighted else losses * weights).sum() / total
        columns = zip(*(result[1 + weighted :] for result in results), strict=True)
        metrics = tuple(
            _merge(column, how, weights / total)
            for column, how in zip(columns, merges, strict=True)
        )
        return loss.astype(losses.dtype), total, metrics

    return jax.jit(combine, in_shardings=placement, out_shardings=placement)


def _merge(parts: Sequence[Any], how: Merge, shares: Any) -> Any:
    if len(parts) == 1 or how == "same":
        return parts[0]
    if isinstance(how, int):
        return jnp.concatenate(parts, how)
    if is_key(parts[0]):
        return parts[-1]
    stacked = jnp.stack(parts)
    if jnp.issubdtype(stacked.dtype, jnp.integer):
        return stacked.sum(0).astype(stacked.dtype)
    if stacked.dtype == bool:
        stacked = stacked.astype(jnp.float32)
    return jnp.tensordot(shares.astype(stacked.dtype), stacked, axes=1)
