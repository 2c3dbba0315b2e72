"""A residual multilayer perceptron for images."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class MLPBlock(nn.Module):
    """Two dense layers, width → 4·width → width, normalised first and added to the input.

    The LayerNorm keeps the activations of a hundred blocks as finite as those of one.

    Attributes:
        dropout: rate of the dropout on what the block adds.
        dtype: type that the block computes in; its parameters are float32.
    """

    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the block.

        Args:
            x: activations, ``[batch, width]``.
            train: whether dropout is on; it then needs the random key ``"dropout"``.

        Returns:
            Activations of the shape of ``x``.
        """
        width = x.shape[-1]
        y = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="mlp_in")(y))
        y = nn.Dense(width, dtype=self.dtype, name="mlp_out")(y)
        return x + nn.Dropout(self.dropout, deterministic=not train, name="dropout_mlp")(y)


class MLP(nn.Module):
    """Flattens the input, then ``embed``, the blocks ``block_0``, ``block_1``…, and ``head``.

    Attributes:
        num_classes: number of classes.
        width: size of the activations between the blocks.
        num_blocks: number of blocks.
        dropout: rate of the dropout on what the blocks add.
        dtype: type that the model computes in; parameters are float32, logits at least float32.
    """

    num_classes: int
    width: int = 128
    num_blocks: int = 4
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes the logits of the classes.

        Args:
            x: images or anything else that can be flattened, ``[batch, ...]``.
            train: whether dropout is on; it then needs the random key ``"dropout"``.

        Returns:
            Logits, float32 or wider, ``[batch, num_classes]``.
        """
        y = x.reshape(x.shape[0], -1)
        y = nn.Dense(self.width, dtype=self.dtype, name="embed")(y)
        for i in range(self.num_blocks):
            y = MLPBlock(self.dropout, self.dtype, name=f"block_{i}")(y, train=train)
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(y)
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))
