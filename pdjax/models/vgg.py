"""VGG-16, a deep chain of convolutions whose weights sit mostly in the dense layers at its end.

Reference: Simonyan and Zisserman, *Very Deep Convolutional Networks for Large-Scale Image
Recognition*, arXiv 1409.1556, table 1, configuration D.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

GROUPS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""(channels, convolutions) of each group; a max-pool that halves the image ends the group."""

MIN_IMAGE_SIZE = 2 ** len(GROUPS)
"""Smallest image side, in pixels, of which the pools leave something."""

_KERNEL_INIT = nn.initializers.he_normal()  # without it the signal dies in 16 layers of ReLU


class VGG16(nn.Module):
    """The 13 convolutions ``conv_0``…``conv_12``, then ``dense_0``, ``dense_1`` and ``head``.

    Departs from the paper: He initialisation in place of copying from a trained smaller network,
    and the optional BatchNorm, which is younger than the paper.

    Attributes:
        num_classes: number of classes.
        dense_width: width of the two dense layers before the head.
        dropout: rate of the dropout after each of these two.
        batch_norm: whether a BatchNorm ``bn_i`` follows convolution i. Its moving averages are the
            collection ``"batch_stats"``, which must be mutable in training.
        width_multiplier: factor on the number of channels, rounded down, but at least one channel.
        dtype: type that the model computes in; parameters are float32, logits at least float32.
    """

    num_classes: int
    dense_width: int = 4096
    dropout: float = 0.5
    batch_norm: bool = False
    width_multiplier: float = 1.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes the logits of the classes.

        Args:
            x: images, ``[batch, height, width, channels]``, at least 32 × 32 pixels each; the
                first dense layer fixes the size at ``init``.
            train: whether dropout is on and BatchNorm uses the statistics of this batch; dropout
                then needs the random key ``"dropout"``.

        Returns:
            Logits, float32 or wider, ``[batch, num_classes]``.

        Raises:
            ValueError: ``x`` is not a batch of images, or the images are too small.
        """
        _check(x)
        conv = functools.partial(
            nn.Conv,
            kernel_size=(3, 3),
            use_bias=not self.batch_norm,
            dtype=self.dtype,
            kernel_init=_KERNEL_INIT,
        )
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        y, i = x, 0
        for channels, num_convs in GROUPS:
            for _ in range(num_convs):
                y = conv(max(1, int(channels * self.width_multiplier)), name=f"conv_{i}")(y)
                y = norm(name=f"bn_{i}")(y) if self.batch_norm else y
                y = nn.relu(y)
                i += 1
            y = nn.max_pool(y, (2, 2), strides=(2, 2))
        y = y.reshape(y.shape[0], -1)
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_KERNEL_INIT)
        for i in range(2):
            y = nn.relu(dense(self.dense_width, name=f"dense_{i}")(y))
            y = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout_{i}")(y)
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(y)
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))


def _check(x: jax.Array) -> None:
    """Raises ``ValueError`` where the model cannot take ``x``."""
    if x.ndim != 4:
        raise ValueError(
            f"got images of shape {x.shape}, expected [batch, height, width, channels]"
        )
    if min(x.shape[1:3]) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"got images of {x.shape[1]} × {x.shape[2]} pixels, expected at least "
            f"{MIN_IMAGE_SIZE} × {MIN_IMAGE_SIZE}, because VGG-16 halves them {len(GROUPS)} times: "
            "resize them"
        )
