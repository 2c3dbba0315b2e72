"""What is trained: VGG-16, and a stacked LSTM with a large vocabulary.

Beside them a residual network, on larger batches: it has few weights and large activations.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pdjax.models import VGG16

VOCABULARY, WIDTH, SEQUENCE = 8192, 512, 16
BATCH_SIZE = {"vgg16": 8, "lstm": 16, "lstm_4": 16, "resnet20": 32}
"""Examples that a worker takes at a time."""


class ResNet20(nn.Module):
    """The network of He et al. (2016), section 4.2, for small images: 0.27 million weights.

    With GroupNorm, since BatchNorm would have statistics that hosts share.
    """

    @nn.compact
    def __call__(self, x, *, train=False):
        del train
        x = nn.relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3))(x)))
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for number in range(3):
                x = ResidualBlock(width, stride if number == 0 else 1)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class ResidualBlock(nn.Module):
    """Two convolutions with a skip connection around them."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.GroupNorm(4)(nn.Conv(self.width, (3, 3), self.stride)(x)))
        y = nn.GroupNorm(4)(nn.Conv(self.width, (3, 3))(y))
        if y.shape != x.shape:
            x = nn.Conv(self.width, (1, 1), self.stride)(x)
        return nn.relu(x + y)


class StackedLSTM(nn.Module):
    """A language model: ``embed``, ``lstm_0``, ``lstm_1``, … and ``head``.

    Attributes:
        num_lstms: how many LSTMs; the head takes about as long as one of them.
    """

    num_lstms: int

    @nn.compact
    def __call__(self, tokens, *, train=False):
        del train
        x: Any = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
        for number in range(self.num_lstms):
            x = nn.RNN(nn.OptimizedLSTMCell(WIDTH), name=f"lstm_{number}")(x)
        return nn.Dense(VOCABULARY, name="head")(x)


MODELS: dict[str, nn.Module] = {
    "vgg16": VGG16(num_classes=10, dropout=0.0, dense_width=4096),
    "resnet20": ResNet20(),
    "lstm": StackedLSTM(num_lstms=6),
    "lstm_4": StackedLSTM(num_lstms=4),
}


def make_model(name, batch_size):
    """The loss function, a function that makes the parameters, and a batch."""
    rng = np.random.default_rng(0)
    model = MODELS[name]
    if not name.startswith("lstm"):
        x = rng.normal(size=(batch_size, 32, 32, 3)).astype(np.float32)
        y = rng.integers(10, size=batch_size)
    else:
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
