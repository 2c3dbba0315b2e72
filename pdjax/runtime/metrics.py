"""A minibatch's loss and metrics out of those of its microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from pdjax.split.stages import StageSplit
from pdjax.trace import jaxprs
from pdjax.trace.jaxprs import Var
from pdjax.trace.jit import Values, jit_on
from pdjax.trees import is_key

Merge = int | Literal["combine", "same"]
"""How the metrics of microbatches become one: concatenated along an axis, combined into a mean or
a sum, or all the same."""


class Results:
    """Puts together what a loss function returns: the loss, its weight if it has one, the metrics.

    Metrics that are to be combined are averaged (by weight), but integers summed; of random keys
    the last one is taken.

    Args:
        split: the loss function, cut into stages.
        num_microbatches: microbatches in a minibatch.
        metric_axes: the axes along which metrics are concatenated; None for those to be combined.
        placement: where the results of all stages are brought together.

    Attributes:
        weighted: whether the loss has a weight.
    """

    def __init__(
        self,
        split: StageSplit,
        num_microbatches: int,
        metric_axes: Sequence[int | None],
        placement: Sharding,
    ) -> None:
        self.weighted = split.traced.weight is not None
        self._made = split.results
        self._num_microbatches = num_microbatches
        self._placement = placement
        metrics = split.results[1 + self.weighted :]
        self._merges: list[Merge] = [
            "same" if not isinstance(atom, Var) else "combine" if axis is None else axis
            for atom, axis in zip(metrics, metric_axes, strict=True)
        ]
        self._combine = jit_on(self._combined, placement)

    def of_minibatch(self, microbatches: Sequence[Values]) -> Values:
        """The results of a minibatch.

        Args:
            microbatches: for each microbatch its results; None where they are known beforehand.
        """
        results = list(map(self._completed, microbatches) if self._constants else microbatches)
        return results[0] if self._are_those_of_one else self._combine(results)

    @cached_property
    def shapes(self) -> Values:
        """Their shapes."""
        shapes = tuple(map(jaxprs.shape_of, self._made))
        if self._are_those_of_one:
            return shapes
        return jax.eval_shape(self._combined, [shapes] * self._num_microbatches)

    @property
    def _are_those_of_one(self) -> bool:
        """Whether nothing has to be put together."""
        return self._num_microbatches == 1 and not self.weighted

    def _completed(self, made: Values) -> Values:
        """The results of a microbatch with those that are known beforehand."""
        return tuple(self._constants.get(at, value) for at, value in enumerate(made))

    @cached_property
    def _constants(self) -> dict[int, Any]:
        """The results that are known beforehand."""
        return {
            at: jax.device_put(jnp.asarray(atom.val, jaxprs.aval(atom).dtype), self._placement)
            for at, atom in enumerate(self._made)
            if not isinstance(atom, Var)
        }

    def _combined(self, results: Sequence[Values]) -> Values:
        losses = jnp.stack([result[0] for result in results])
        if self.weighted:
            weights = jnp.stack([result[1] for result in results])
        else:
            wide = jnp.promote_types(losses.dtype, jnp.float32)
            weights = jnp.ones(self._num_microbatches, wide)
        total = weights.sum()
        loss = (losses if self.weighted else losses * weights).sum() / total
        columns = zip(*(result[1 + self.weighted :] for result in results), strict=True)
        metrics = (
            _merge(column, how, weights / total)
            for column, how in zip(columns, self._merges, strict=True)
        )
        return loss.astype(losses.dtype), *([total] if self.weighted else []), *metrics


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
