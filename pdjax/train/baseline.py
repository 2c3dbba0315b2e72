"""The same model on one device, without a pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


class SingleDevice:
    """A plain jitted train step on the first device, to measure beside the pipeline."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        optimizer: optax.GradientTransformation,
        params: Any,
        model_state: Any,
    ) -> None:
        self._key = jax.random.key(0)
        self._params, self._state = jax.tree.map(jnp.copy, (params, model_state))
        self._optimizer_state = optimizer.init(self._params)

        def loss(params: Any, state: Any, batch: Any, key: Any) -> tuple[Any, Any]:
            if state is None:
                return loss_fn(params, batch, key)[0], None
            value, (new_state, _) = loss_fn(params, state, batch, key)
            return value, new_state

        def step(params: Any, state: Any, opt: Any, batch: Any, key: Any) -> Any:
            (value, state), grads = jax.value_and_grad(loss, has_aux=True)(
                params, state, batch, key
            )
            updates, opt = optimizer.update(grads, opt, params)
            return optax.apply_updates(params, updates), state, opt, value

        self._step = jax.jit(step, donate_argnums=(0, 2))

    def run(self, batches: list[Any]) -> float:
        """Trains on `batches` and returns the seconds that it took."""
        start = time.perf_counter()
        value = None
        for batch in batches:
            self._params, self._state, self._optimizer_state, value = self._step(
                self._params, self._state, self._optimizer_state, batch, self._key
            )
        jax.block_until_ready((value, self._params))
        return time.perf_counter() - start
