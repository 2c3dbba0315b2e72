"""The two models of the benchmark: eight equal blocks and a mean squared error."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pdjax.models.mlp import MLPBlock
from pdjax.models.transformer import TransformerBlock

NUM_BLOCKS, WIDTH, NUM_MICROBATCHES = 8, 256, 8
SHAPES = {"transformer": (16, 128, WIDTH), "mlp": (512, WIDTH)}
"""Of a minibatch."""


def make_optimizer():
    return optax.sgd(1e-3, momentum=0.9)


def make_model(name):
    """The loss function, the parameters, and a minibatch."""
    shape = SHAPES[name]
    rng = np.random.default_rng(0)
    batch = {part: rng.normal(size=shape).astype(np.float32) for part in ("x", "y")}
    if name == "mlp":
        block, rest = MLPBlock(), ()
    else:
        block, rest = (
            TransformerBlock(num_heads=8),
            (jnp.tril(jnp.ones((1, 1, *[shape[1]] * 2), bool)),),
        )
    keys = jax.random.split(jax.random.key(0), NUM_BLOCKS)
    init = jax.jit(lambda key: block.init(key, jnp.zeros((1, *shape[1:])), *rest)["params"])
    params = {f"block_{n}": init(key) for n, key in enumerate(keys)}

    def loss_fn(params, batch):
        y = batch["x"]
        for n in range(NUM_BLOCKS):
            with jax.named_scope(f"block_{n}"):
                y = block.apply({"params": params[f"block_{n}"]}, y, *rest)
        return jnp.mean((y - batch["y"]) ** 2)

    return loss_fn, params, batch
