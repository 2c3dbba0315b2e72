"""The toy model that everything in this folder trains.

8 residual blocks x + gelu(x W + b) V + c of a given width (hidden 4 x width), mean square error.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

NUM_BLOCKS = 8


def block(p, x):
    return x + jax.nn.gelu(x @ p["w"] + p["b"]) @ p["v"] + p["c"]


def mean_square(x, y):
    return jnp.mean((x - y) ** 2)


def loss_fn(params, batch, rng):
    del rng
    x = batch["x"]
    for i in range(NUM_BLOCKS):
        x = block(params[f"block_{i}"], x)
    return mean_square(x, batch["y"])


def make_params(width):
    def one(key):
        first, second = jax.random.split(key)
        return {
            "w": jax.random.normal(first, (width, 4 * width)) / width**0.5,
            "b": jnp.zeros(4 * width),
            "v": jax.random.normal(second, (4 * width, width)) / (4 * width) ** 0.5,
            "c": jnp.zeros(width),
        }

    keys = jax.random.split(jax.random.key(0), NUM_BLOCKS)
    return {f"block_{i}": one(keys[i]) for i in range(NUM_BLOCKS)}


def make_batch(width, size):
    """A minibatch in numpy arrays, ``[size, width]`` each."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(size, width)).astype(np.float32) for name in "xy"}


def equal_cuts(num_stages):
    """The blocks with which the stages after the first begin."""
    return [f"block_{i * NUM_BLOCKS // num_stages}" for i in range(1, num_stages)]
