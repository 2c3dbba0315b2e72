"""NNX modules train as Linen ones do, and their random streams follow the microbatch."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pdjax

KEY = jax.random.key(4)


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dropout(nnx.relu(self.norm(self.linear(x))))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(4, rngs) for _ in range(3)])
        self.out = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def loss_fn(model: Model, batch: Any) -> Any:
    error = model(batch["x"]) - batch["y"]
    return jnp.mean(error**2), {"worst": jnp.abs(error).max()}


def make_batch(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(24, 4)).astype(np.float32),
        "y": rng.normal(size=(24, 1)).astype(np.float32),
    }


def train(num_stages: int) -> tuple[Any, Any, list[Any]]:
    model = Model(nnx.Rngs(0))
    f = pdjax.nnx.functionalize(model, loss_fn)
    pipe = pdjax.Pipeline(f.loss_fn, optax.sgd(0.05), num_stages=num_stages, num_microbatches=3)
    state = pipe.init(f.params, make_batch(0), model_state=f.model_state, rng=KEY)
    losses = []
    for seed in range(3):
        state, metrics = pipe.step(state, make_batch(seed))
        losses.append(metrics["loss"])
    pdjax.nnx.update(model, pipe, state)
    return model, pipe, losses


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_equals_one_device(num_stages):
    model, _, losses = train(num_stages)
    f = pdjax.nnx.functionalize(Model(nnx.Rngs(0)), loss_fn)
    params, state, count, expected = f.params, f.model_state, 0, []
    gradient = jax.value_and_grad(f.loss_fn, has_aux=True)
    for seed in range(3):
        parts = []
        for index in range(3):
            part = jax.tree.map(lambda a, i=index: a[8 * i : 8 * i + 8], make_batch(seed))
            (loss, (state, _)), grads = gradient(
                params, state, part, jax.random.fold_in(KEY, count)
            )
            parts.append((loss, grads))
            count += 1
        loss, grads = jax.tree.map(lambda *leaves: sum(leaves) / 3, *parts)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
        expected.append(loss)
    chex.assert_trees_all_close(losses, expected, rtol=1e-5)
    got = nnx.state(model, nnx.Param)
    chex.assert_trees_all_close(jax.tree.leaves(got), jax.tree.leaves(params), atol=3e-6)
    statistics = nnx.state(model, nnx.BatchStat)
    chex.assert_trees_all_close(jax.tree.leaves(statistics), jax.tree.leaves(state), atol=1e-5)


def test_stage_of_parameters_is_a_state():
    _, pipe, _ = train(2)
    stages = pipe.stage_of_parameters()
    assert isinstance(stages, nnx.State)
    assert set(jax.tree.leaves(stages)) == {0, 1}


def test_a_loss_that_takes_a_key():
    def noisy(model, batch, rng):
        return jnp.mean(model(batch["x"] + jax.random.normal(rng, batch["x"].shape)) ** 2)

    model = Model(nnx.Rngs(0))
    model.eval()
    f = pdjax.nnx.functionalize(model, noisy)
    pipe = pdjax.Pipeline(f.loss_fn, optax.sgd(0.1), num_stages=2, num_microbatches=1)
    batch = make_batch(0)
    state = pipe.init(f.params, batch, model_state=f.model_state, rng=KEY)
    _, metrics = pipe.step(state, batch)
    expected = noisy(model, batch, jax.random.fold_in(KEY, 0))
    chex.assert_trees_all_close(metrics["loss"], expected, rtol=1e-5)
