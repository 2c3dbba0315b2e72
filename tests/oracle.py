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


def _value_and_grad(loss_fn: Callable[..., Any], model_state: Any) -> Callable[..., Any]:
    """(params, state, batch, key) -> (loss, new state), gradient; also for a loss without state."""
    if model_state is not None:
        return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    return jax.jit(
        jax.value_and_grad(lambda p, _, batch, key: (loss_fn(p, batch, key), None), has_aux=True)
    )


def replay_synchronous(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    params: Any,
    batches: Sequence[Any],
    num_microbatches: int,
    key: Any,
    model_state: Any = None,
) -> tuple[Any, list[Any], Any]:
    """The mean gradient over microbatches, applied once a minibatch, the state threaded in order.

    Returns (parameters, losses, state).
    """
    grad = _value_and_grad(loss_fn, model_state)
    state, losses, count = optimizer.init(params), [], 0
    for batch in batches:
        parts = []
        for index in range(num_microbatches):
            part = microbatch(batch, index, num_microbatches)
            mine = jax.random.fold_in(key, count)
            (loss, model_state), gradient = grad(params, model_state, part, mine)
            parts.append((loss, gradient))
            count += 1
        loss, mean = jax.tree.map(lambda *leaves: sum(leaves) / num_microbatches, *parts)
        updates, state = optimizer.update(mean, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    return params, losses, model_state


def replay_asynchronous(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    params: Any,
    batches: Sequence[Any],
    stage_of: Any,
    num_stages: int,
    key: Any,
    drains: Sequence[int] = (),
    model_state: Any = None,
    *,
    rule: str = "stash",
    num_microbatches: int = 1,
) -> tuple[Any, list[Any], Any]:
    """PipeDream and its kin: (parameters, losses, state).

    Minibatch b, counted from the last drain, uses on stage s the version u + max(0, b - delay), u
    the updates at that drain. The delay is num_stages - 1 - s under weight stashing, num_stages - 1
    on all stages under vertical sync, 1 under double buffering. The mean gradient of every
    minibatch is applied to the newest version, in order. A drain comes before each minibatch in
    `drains`.
    """
    grad = _value_and_grad(loss_fn, model_state)
    versions, state, losses, start = [params], optimizer.init(params), [], 0
    for index, batch in enumerate(batches):
        if index in drains:
            start = index

        def used(stage: int, *leaves: Any, since: int = start, now: int = index) -> Any:
            warm_up = num_stages - 1 - stage
            delay = {"stash": warm_up, "vertical_sync": num_stages - 1, "double_buffer": 1}[rule]
            return leaves[since + max(0, now - since - delay)]

        mixed = jax.tree.map(used, stage_of, *versions)
        parts = []
        for at in range(num_microbatches):
            part = microbatch(batch, at, num_microbatches)
            mine = jax.random.fold_in(key, index * num_microbatches + at)
            (loss, model_state), gradient = grad(mixed, model_state, part, mine)
            parts.append((loss, gradient))
        loss, mean = jax.tree.map(lambda *leaves: sum(leaves) / num_microbatches, *parts)
        updates, state = optimizer.update(mean, state, versions[-1])
        versions.append(optax.apply_updates(versions[-1], updates))
        losses.append(loss)
    return versions[-1], losses, model_state
