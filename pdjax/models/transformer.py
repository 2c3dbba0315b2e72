"""A decoder-only transformer language model."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_EMBED_INIT = nn.initializers.normal(stddev=0.02)


class TransformerBlock(nn.Module):
    """Self-attention and an MLP four times as wide, each normalised first and added to its input.

    Attributes:
        num_heads: number of attention heads; divides the width of the input.
        dropout: rate of the dropout on what each of the two halves adds.
        dtype: type that the block computes in; its parameters are float32.
    """

    num_heads: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the block.

        Args:
            x: activations, ``[batch, sequence, width]``.
            mask: true where a query may look at a key, ``[1, 1, sequence, sequence]``.
            train: whether dropout is on; it then needs the random key ``"dropout"``.

        Returns:
            Activations of the shape of ``x``.
        """
        width = x.shape[-1]
        y = nn.LayerNorm(dtype=self.dtype, name="norm_attention")(x)
        y = nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype, name="attention")(
            y, mask=mask
        )
        x = x + nn.Dropout(self.dropout, deterministic=not train, name="dropout_attention")(y)
        y = nn.LayerNorm(dtype=self.dtype, name="norm_mlp")(x)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="mlp_in")(y))
        y = nn.Dense(width, dtype=self.dtype, name="mlp_out")(y)
        return x + nn.Dropout(self.dropout, deterministic=not train, name="dropout_mlp")(y)


class Transformer(nn.Module):
    """A causal language model: the logits at a position depend on the tokens up to there.

    The parts, in order: ``embed`` and the learned ``positions``, the blocks ``block_0``,
    ``block_1`` and so on, a last LayerNorm ``norm``, and the linear ``head``. The default size is
    one that learns from a few hundred steps on a laptop's processor.

    Attributes:
        vocab_size: number of different tokens.
        width: size of the activations; a multiple of ``num_heads``.
        num_heads: number of attention heads of each block.
        num_blocks: number of blocks.
        dropout: rate of the dropout on the embedding and on what the blocks add.
        max_length: length of the longest sequence that the model takes.
        tie_embeddings: whether the table of ``embed`` makes the logits too, in place of ``head``.
        dtype: type that the model computes in; parameters are float32, logits at least float32.
    """

    vocab_size: int
    width: int = 64
    num_heads: int = 2
    num_blocks: int = 2
    dropout: float = 0.1
    max_length: int = 512
    tie_embeddings: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes the logits of the next token at every position.

        Args:
            x: integer tokens, ``[batch, sequence]``.
            train: whether dropout is on; it then needs the random key ``"dropout"``.

        Returns:
            Logits, float32 or wider, ``[batch, sequence, vocab_size]``.

        Raises:
            ValueError: ``x`` is not a batch of integer sequences, a sequence is longer than
                ``max_length``, or ``width`` is not a multiple of ``num_heads``.
        """
        self._check(x)
        length = x.shape[1]
        embed, positions = (
            nn.Embed(size, self.width, dtype=self.dtype, embedding_init=_EMBED_INIT, name=name)
            for size, name in ((self.vocab_size, "embed"), (self.max_length, "positions"))
        )
        mask = nn.make_causal_mask(jnp.ones((1, length)), dtype=jnp.bool_)
        y = embed(x) + positions(jnp.arange(length))
        y = nn.Dropout(self.dropout, deterministic=not train, name="dropout_embed")(y)
        for i in range(self.num_blocks):
            block = TransformerBlock(self.num_heads, self.dropout, self.dtype, name=f"block_{i}")
            y = block(y, mask, train=train)
        y = nn.LayerNorm(dtype=self.dtype, name="norm")(y)
        if self.tie_embeddings:
            logits = embed.attend(y)
        else:
            logits = nn.Dense(self.vocab_size, dtype=self.dtype, name="head")(y)
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _check(self, x: jax.Array) -> None:
        """Raises ``ValueError`` where the model cannot take ``x``."""
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"got {x.dtype} tokens of shape {x.shape}, expected integers [batch, sequence]"
            )
        if x.shape[1] > self.max_length:
            raise ValueError(
                f"got sequences of {x.shape[1]} tokens, expected at most max_length="
                f"{self.max_length}: shorten them or raise max_length"
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"got width={self.width} with num_heads={self.num_heads}, expected a width that is "
                "a multiple of num_heads: change one of them"
            )
