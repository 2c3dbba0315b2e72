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


def _counts(part: Any) -> bool:
    return isinstance(part, (optax.ScaleByScheduleState, optax.InjectHyperparamsState))


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
    replicas: Sequence[int] | None = None,
    warm_ups: Sequence[int] | None = None,
    scaled: bool = False,
) -> tuple[Any, list[Any], Any]:
    """PipeDream and its kin: (parameters, losses, state).

    Minibatch b, counted from the last drain, uses on stage s version u + max(0, b // r - delay), u
    the updates at that drain, r the stage's replicas. The delay is the warm-up W of the stage
    under weight stashing, that of stage 0 on all stages under vertical sync, 1 under double
    buffering. The mean gradient of a round of r minibatches is applied to the newest version. A
    drain, before each minibatch in `drains` and at the end, applies what there is of a round.
    Schedules of hyperparameters count minibatches. If `scaled` the updates of a stage are
    multiplied by its replicas over those of stage 0.
    """
    grad = _value_and_grad(loss_fn, model_state)
    turns = tuple(replicas or [1] * num_stages)
    ahead = tuple(warm_ups or range(num_stages - 1, -1, -1))
    delays = {"stash": ahead, "vertical_sync": ahead[:1] * num_stages}
    delay = delays.get(rule, (1,) * num_stages)
    versions = [[params] for _ in turns]  # of each stage; only its own leaves count
    states, pending = [optimizer.init(params) for _ in turns], [[] for _ in turns]
    base, start, losses = [0] * num_stages, 0, []

    def update(stage: int) -> None:
        if pending[stage]:
            mean = jax.tree.map(lambda *g: sum(g) / len(g), *pending[stage])
            newest = versions[stage][-1]
            updates, state = optimizer.update(mean, states[stage], newest)
            more = len(pending[stage]) - 1
            states[stage] = jax.tree.map(
                lambda part: part._replace(count=part.count + more) if _counts(part) else part,
                state,
                is_leaf=_counts,
            )
            factor = turns[stage] / turns[0] if scaled else 1
            updates = jax.tree.map(lambda leaf: leaf * factor, updates)
            versions[stage].append(optax.apply_updates(newest, updates))
            pending[stage].clear()

    for index, batch in enumerate(batches):
        if index in drains:
            for stage in range(num_stages):
                update(stage)
            start, base = index, [len(each) - 1 for each in versions]
        age = [max(0, (index - start) // r - d) for r, d in zip(turns, delay, strict=True)]
        used = [each[u + a] for each, u, a in zip(versions, base, age, strict=True)]
        mixed = jax.tree.map(lambda stage, *leaves: leaves[stage], stage_of, *used)
        parts = []
        for at in range(num_microbatches):
            part = microbatch(batch, at, num_microbatches)
            mine = jax.random.fold_in(key, index * num_microbatches + at)
            (loss, model_state), gradient = grad(mixed, model_state, part, mine)
            parts.append((loss, gradient))
        loss, mean = jax.tree.map(lambda *leaves: sum(leaves) / num_microbatches, *parts)
        losses.append(loss)
        for stage in range(num_stages):
            pending[stage].append(mean)
            if len(pending[stage]) == turns[stage]:
                update(stage)
    for stage in range(num_stages):
        update(stage)
    newest = [each[-1] for each in versions]
    return jax.tree.map(lambda s, *leaves: leaves[s], stage_of, *newest), losses, model_state
