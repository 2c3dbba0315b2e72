"""A minibatch's loss and metrics out of those of its microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from pdjax.runtime.placed import Values


def mean_of_results(
    num_microbatches: int,
    weighted: bool,
    axes: Sequence[int | None],
    placement: Sharding,
) -> Any:
    """The function that makes a minibatch's results out of its microbatches'.

    It takes a tuple of results (loss, weight if `weighted`, metrics) for each microbatch and
    returns ``(loss, weight, metrics)``. A metric that has a batch axis is concatenated along it;
    of the others the real ones are averaged (by weight) and the integers summed.
    """

    def combine(results: Sequence[Values]) -> tuple[Any, Any, Values]:
        losses = jnp.stack([result[0] for result in results])
        if weighted:
            weights = jnp.stack([result[1] for result in results])
        else:
            weights = jnp.ones(num_microbatches, jnp.float32)
        total = weights.sum()
        loss = (losses if weighted else losses * weights).sum() / total
        columns = zip(*(result[1 + weighted :] for result in results), strict=True)
        metrics = tuple(
            _merge(column, axis, weights / total)
            for column, axis in zip(columns, axes, strict=True)
        )
        return loss.astype(losses.dtype), total, metrics

    return jax.jit(combine, in_shardings=placement, out_shardings=placement)


def _merge(parts: Sequence[Any], axis: int | None, shares: Any) -> Any:
    if len(parts) == 1:
        return parts[0]
    if axis is not None:
        return jnp.concatenate(parts, axis)
    stacked = jnp.stack(parts)
    if not jnp.issubdtype(stacked.dtype, jnp.inexact):
        return stacked.sum(0).astype(stacked.dtype) if stacked.dtype != bool else stacked.sum(0)
    return jnp.tensordot(shares.astype(stacked.dtype), stacked, axes=1)
