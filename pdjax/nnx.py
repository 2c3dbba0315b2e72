"""Flax NNX modules as loss functions of parameters.

NNX modules hold their parameters themselves. `functionalize` takes a module apart so that a
`pdjax.Pipeline` can train it, and `update` writes what was learned back into it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pdjax.trace.loss_fn import read_result
from pdjax.trace.random_key import taking_key
from pdjax.trees import is_key


class Functional(NamedTuple):
    """A loss over an NNX module, as `pdjax.Pipeline` takes it.

    Attributes:
        loss_fn: ``loss_fn(params, model_state, batch, rng)``.
        params: the module's parameters (`nnx.Param`).
        model_state: its other variables, such as BatchNorm statistics; random keys and counters
            are not among them.
    """

    loss_fn: Callable[..., Any]
    params: nnx.State
    model_state: nnx.State


def functionalize(
    model: nnx.Module, loss_fn: Callable[..., Any], *, weighted_loss: bool = False
) -> Functional:
    """Turns a loss over a module into one over its parameters.

    Every call of the loss begins with the random streams that belong to its microbatch: their
    keys are made from the microbatch's key, and their counters start at zero. So dropout does
    not depend on the schedule or the number of stages.

    Example:
        >>> import jax.numpy as jnp, optax, pdjax
        >>> from flax import nnx
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.hidden = nnx.Linear(3, 8, rngs=rngs)
        ...         self.out = nnx.Linear(8, 1, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.out(nnx.relu(self.hidden(x)))
        >>> def loss_fn(model, batch):
        ...     return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
        >>> model = Model(nnx.Rngs(0))
        >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 1))}
        >>> f = pdjax.nnx.functionalize(model, loss_fn)
        >>> pipe = pdjax.Pipeline(f.loss_fn, optax.adam(1e-2), num_stages=1)
        >>> state = pipe.init(f.params, batch, model_state=f.model_state)
        >>> state, metrics = pipe.step(state, batch)
        >>> pdjax.nnx.update(model, pipe, state)

    Args:
        model: the module, in the mode that `loss_fn` should run it in (``model.train()``).
        loss_fn: ``loss_fn(model, batch)`` that returns ``loss`` or ``(loss, metrics)``; it may
            take a random key as its third argument.
        weighted_loss: whether the loss is a pair ``(sum, weight)``; to be told to the
            `pdjax.Pipeline` as well.
    """
    graph, params, streams, others = nnx.split(model, nnx.Param, nnx.RngState, ...)
    loss_of = taking_key(loss_fn, stateful=False)

    def functional(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        reseeded = _reseed(streams, rng)
        module = nnx.merge(graph, params, reseeded, model_state, copy=True)
        loss, _, metrics = read_result(loss_of(module, batch, rng), None, weighted_loss)
        *_, new_state = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return (loss, new_state) if metrics is None else (loss, (new_state, metrics))

    return Functional(functional, params, others)


def update(model: nnx.Module, pipe: Any, state: Any) -> None:
    """Writes the newest parameters and mutable state of `pipe` into `model`."""
    nnx.update(model, pipe.params(state), pipe.model_state(state))


def _reseed(streams: nnx.State, rng: Any) -> nnx.State:
    """The random streams with keys made from `rng` and counters at zero."""
    leaves, tree = jax.tree.flatten(streams)
    fresh = [
        _like(jax.random.fold_in(rng, at), leaf) if is_key(leaf) else jnp.zeros_like(leaf)
        for at, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, fresh)


def _like(key: Any, leaf: Any) -> Any:
    """A key of the implementation and shape of `leaf`."""
    typed = key if is_key(key) else jax.random.wrap_key_data(key)
    data = jax.random.key_data(typed)
    single = jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return single if not leaf.shape else jax.random.split(single, leaf.shape)
