"""The models of the PipeDream paper that pdjax.models lacks: plain Flax Linen, with a loss each.

They are there for their shapes: nothing here is trained. `MODELS` has a row for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pdjax.models import VGG16


class Bottleneck(nn.Module):
    """Three convolutions, 1×1, 3×3 and 1×1, added to the input (He et al., arXiv 1512.03385)."""

    channels: int
    stride: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, use_running_average=not self.train)
        conv = functools.partial(nn.Conv, use_bias=False)
        y = nn.relu(norm(name="bn_0")(conv(self.channels, (1, 1), name="conv_0")(x)))
        y = conv(self.channels, (3, 3), (self.stride, self.stride), name="conv_1")(y)
        y = nn.relu(norm(name="bn_1")(y))
        y = norm(name="bn_2")(conv(4 * self.channels, (1, 1), name="conv_2")(y))
        if x.shape != y.shape:
            strides = (self.stride, self.stride)
            x = conv(4 * self.channels, (1, 1), strides, name="conv_skip")(x)
            x = norm(name="bn_skip")(x)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """50 layers: a convolution, 3 + 4 + 6 + 3 bottlenecks, a dense layer."""

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = nn.Conv(64, (7, 7), (2, 2), use_bias=False, name="conv")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(y))
        y = nn.max_pool(y, (3, 3), (2, 2), "SAME")
        for group, count in enumerate((3, 4, 6, 3)):
            for i in range(count):
                stride = 2 if group and i == 0 else 1
                y = Bottleneck(64 * 2**group, stride, train, name=f"block_{group}_{i}")(y)
        return nn.Dense(self.num_classes, name="head")(y.mean((1, 2)))


def lstm(width: int, name: str, x: jax.Array, reverse: bool = False) -> jax.Array:
    """The outputs of an LSTM layer for all words."""
    rnn: Any = nn.RNN(nn.OptimizedLSTMCell(width), reverse=reverse, keep_order=True, name=name)
    return rnn(x)


class GNMT(nn.Module):
    """Translation by LSTMs with attention (Wu et al., arXiv 1609.08144).

    As in the form that the PipeDream paper trained: the first layer of the encoder reads in both
    directions, layers from the third on are residual, and the attention of the decoder's first
    layer is an input of all later ones. Departs from it in that the attention looks with the
    states of the whole first layer at once, as the decoder reads the right words in training.

    Attributes:
        num_layers: LSTM layers, half of them in the encoder.
    """

    num_layers: int = 8
    vocab_size: int = 32320
    width: int = 1024

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        memory = self._encode(source)
        y = nn.Embed(self.vocab_size, self.width, name="embed_target")(target)
        y = lstm(self.width, "decoder_0", y)
        context = self._attend(y, memory)
        for i in range(1, self.num_layers // 2):
            out = lstm(self.width, f"decoder_{i}", jnp.concatenate([y, context], -1))
            y = out + y if i > 1 else out
        return nn.Dense(self.vocab_size, name="head")(y)

    @nn.nowrap
    def _encode(self, source: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocab_size, self.width, name="embed_source")(source)
        there = lstm(self.width, "encoder_0_there", x)
        back = lstm(self.width, "encoder_0_back", x, reverse=True)
        y = lstm(self.width, "encoder_1", jnp.concatenate([there, back], -1))
        for i in range(2, self.num_layers // 2):
            y = y + lstm(self.width, f"encoder_{i}", y)
        return y

    @nn.nowrap
    def _attend(self, y: jax.Array, memory: jax.Array) -> jax.Array:
        """Additive attention, normalised (Bahdanau)."""
        query = nn.Dense(self.width, use_bias=False, name="attention_query")(y)
        keys = nn.Dense(self.width, use_bias=False, name="attention_key")(memory)
        both = jnp.tanh(query[:, :, None] + keys[:, None])
        scores = nn.Dense(1, use_bias=False, name="attention_score")(both)[..., 0]
        return nn.softmax(scores) @ memory


def score(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def vgg16_loss(params: Any, batch: Any, rng: jax.Array) -> jax.Array:
    logits = VGG16(1000).apply({"params": params}, batch["x"], train=True, rngs={"dropout": rng})
    return score(logits, batch["y"])  # type: ignore[arg-type]


def resnet50_loss(params: Any, state: Any, batch: Any) -> Any:
    variables = {"params": params, **state}
    logits, new = ResNet50().apply(variables, batch["x"], train=True, mutable=["batch_stats"])
    return score(logits, batch["y"]), dict(new)


def gnmt_loss(params: Any, batch: Any, *, num_layers: int) -> jax.Array:
    logits = GNMT(num_layers).apply({"params": params}, batch["x"], batch["target"])
    return score(logits, batch["y"])  # type: ignore[arg-type]


_Leaves = dict[str, tuple[tuple[int, ...], Any]]


@dataclass(frozen=True)
class Row:
    """A model of the paper.

    Attributes:
        module: the model.
        loss_fn: its loss, of parameters, state if it has one, and a batch.
        batch_size: examples for each worker, as in the paper (SOSP 2019, section 5.1).
        batch: shape and dtype of each leaf of one example.
        reads: names of the leaves that the model takes.
    """

    module: nn.Module
    loss_fn: Callable[..., Any]
    batch_size: int
    batch: _Leaves
    reads: tuple[str, ...] = ("x",)


_IMAGES: _Leaves = {"x": ((224, 224, 3), jnp.float32), "y": ((), jnp.int32)}
_LENGTH = 50  # the longest sentences that GNMT was trained on
_WORDS: _Leaves = dict.fromkeys(("x", "target", "y"), ((_LENGTH,), jnp.int32))


def _gnmt(num_layers: int) -> Row:
    loss_fn = functools.partial(gnmt_loss, num_layers=num_layers)
    return Row(GNMT(num_layers), loss_fn, 64, _WORDS, ("x", "target"))


MODELS: dict[str, Row] = {
    "vgg16": Row(VGG16(1000), vgg16_loss, 64, _IMAGES),
    "resnet50": Row(ResNet50(), resnet50_loss, 128, _IMAGES),
    "gnmt8": _gnmt(8),
    "gnmt16": _gnmt(16),
}
