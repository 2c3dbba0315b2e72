"""What a pipeline must compute, said again on one device without any pipeline.

Every function here uses `jax.value_and_grad` on the whole loss function and keeps all old versions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

LossAndGrad = Callable[..., tuple[Any, Any]]


def microbatch(batch: Any, index: int, num_microbatches: int) -> Any:
    """The part of a minibatch that is microbatch `index`."""

    def part(leaf: Any) -> Any:
        size = leaf.shape[0] // num_microbatches
        return leaf[index * size : (index + 1) * size]

    return jax.tree.map(part, batch)


def replay_synchronous(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    params: Any,
    batches: Sequence[Any],
    num_microbatches: int,
    key: Any,
) -> tuple[Any, list[Any]]:
    """The mean gradient over microbatches, applied once a minibatch: (parameters, losses)."""
    grad = jax.jit(jax.value_and_grad(loss_fn))
    state, losses, count = optimizer.init(params), [], 0
    for batch in batches:
        total, loss_sum = None, 0.0
        for index in range(num_microbatches):
            part = microbatch(batch, index, num_microbatches)
            loss, gradient = grad(params, part, jax.random.fold_in(key, count))
            total = gradient if total is None else jax.tree.map(jax.numpy.add, total, gradient)
            loss_sum, count = loss_sum + loss, count + 1
        mean = jax.tree.map(lambda leaf: leaf / num_microbatches, total)
        updates, state = optimizer.update(mean, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss_sum / num_microbatches)
    return params, losses


def replay_asynchronous(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    params: Any,
    batches: Sequence[Any],
    stage_of: Any,
    num_stages: int,
    key: Any,
    drains: Sequence[int] = (),
) -> tuple[Any, list[Any]]:
    """PipeDream with weight stashing: (parameters, losses).

    Minibatch b, counted from the last drain, uses on stage s the version u + max(0, b - W) for
    W = num_stages - 1 - s and u the updates at that drain; the gradient of every minibatch is
    applied to the newest version, in order. A drain comes before each minibatch in `drains`.
    """
    grad = jax.jit(jax.value_and_grad(loss_fn))
    versions, state, losses, start = [params], optimizer.init(params), [], 0
    for index, batch in enumerate(batches):
        if index in drains:
            start = index

        def used(stage: int, *leaves: Any, since: int = start, now: int = index) -> Any:
            warm_up = num_stages - 1 - stage
            return leaves[since + max(0, now - since - warm_up)]

        mixed = jax.tree.map(used, stage_of, *versions)
        loss, gradient = grad(mixed, batch, jax.random.fold_in(key, index))
        updates, state = optimizer.update(gradient, state, versions[-1])
        versions.append(optax.apply_updates(versions[-1], updates))
        losses.append(loss)
    return versions[-1], losses
