"""What is trained: VGG-16, and a stacked LSTM with a large vocabulary.

Beside them VGG-16 without its wide layers, on larger batches: it computes much for each weight.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pdjax.models import VGG16

VOCABULARY, WIDTH, NUM_LSTMS, SEQUENCE = 8192, 512, 4, 16
BATCH_SIZE = {"vgg16": 8, "lstm": 16, "convolutions": 32}
"""Examples that a worker takes at a time."""


class StackedLSTM(nn.Module):
    """A language model: ``embed``, ``lstm_0``, ``lstm_1``, … and ``head``."""

    @nn.compact
    def __call__(self, tokens, *, train=False):
        del train
        x: Any = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
        for number in range(NUM_LSTMS):
            x = nn.RNN(nn.OptimizedLSTMCell(WIDTH), name=f"lstm_{number}")(x)
        return nn.Dense(VOCABULARY, name="head")(x)


def make_model(name, batch_size):
    """The loss function, a function that makes the parameters, and a batch."""
    rng = np.random.default_rng(0)
    if name in ("vgg16", "convolutions"):
        width = 4096 if name == "vgg16" else 512
        model = VGG16(num_classes=10, dropout=0.0, dense_width=width)
        x = rng.normal(size=(batch_size, 32, 32, 3)).astype(np.float32)
        y = rng.integers(10, size=batch_size)
    else:
        model = StackedLSTM()
        x = rng.integers(VOCABULARY, size=(batch_size, SEQUENCE)).astype(np.int32)
        y = rng.integers(VOCABULARY, size=(batch_size, SEQUENCE))

    def loss_fn(params, batch):
        logits: Any = model.apply({"params": params}, batch["x"], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    def init():
        return model.init(jax.random.key(0, impl="rbg"), jnp.asarray(x[:1]))["params"]

    return loss_fn, init, {"x": x, "y": y.astype(np.int32)}


def make_optimizer():
    return optax.sgd(1e-4, momentum=0.9)
