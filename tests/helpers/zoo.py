"""Small models for the tests, each with the loss function that its owner would write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pdjax.models import build_model
from pdjax.trace.layers import LayerGraph, build_graph

MICROBATCH = 2
"""Examples in a microbatch: the same in all tests, so that the same programs are compiled."""


@dataclass(frozen=True)
class Case:
    """A model as a user brings it.

    Attributes:
        loss_fn: loss_fn(params, batch, rng), or with model_state in second place.
        params: initial parameters.
        model_state: mutable state, or None.
        make_batch: makes a minibatch of a number of examples from a seed.
    """

    loss_fn: Callable[..., Any]
    params: Any
    model_state: Any
    make_batch: Callable[[int, int], Any]

    def double(self) -> Case:
        """The same with parameters, state and batches in float64, for tests with `jax.enable_x64`.

        A model must be built to compute in that type; its own field says so.
        """
        return replace(
            self,
            params=_double(self.params),
            model_state=_double(self.model_state),
            make_batch=lambda size, seed: _double(self.make_batch(size, seed)),
        )


def _double(tree: Any) -> Any:
    def double(leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        return leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf

    return jax.tree.map(double, tree)


def transformer(*, train: bool = True, dropout: float = 0.0, **fields: Any) -> Case:
    model = build_model(
        "transformer", 11, width=8, num_heads=2, num_blocks=2, dropout=dropout, **fields
    )

    def make_batch(size: int, seed: int) -> Any:
        tokens = np.random.default_rng(seed).integers(0, 11, (size, 5), dtype=np.int32)
        return {"x": tokens[:, :-1], "y": tokens[:, 1:]}

    return _classifier(model, make_batch, train)


def mlp(*, train: bool = True, dropout: float = 0.0, **fields: Any) -> Case:
    model = build_model("mlp", 3, width=4, num_blocks=3, dropout=dropout, **fields)
    return _classifier(model, _images(4), train)


def vgg(*, train: bool = True, **fields: Any) -> Case:
    model = build_model("vgg16", 3, width_multiplier=1 / 32, dense_width=8, dropout=0.0, **fields)
    return _classifier(model, _images(32), train)


def _images(side: int) -> Callable[[int, int], Any]:
    def make_batch(size: int, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        images = rng.normal(size=(size, side, side, 1)).astype(np.float32)
        return {"x": images, "y": rng.integers(0, 3, size, dtype=np.int32)}

    return make_batch


def _classifier(model: Any, make_batch: Callable[[int, int], Any], train: bool) -> Case:
    example = make_batch(MICROBATCH, 0)
    variables = jax.jit(model.init)(jax.random.key(0, impl="unsafe_rbg"), example["x"])
    params, state = variables["params"], variables.get("batch_stats")

    def loss_of(logits: Any, batch: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    def loss_fn(params: Any, batch: Any, rng: Any) -> Any:
        logits = model.apply({"params": params}, batch["x"], train=train, rngs={"dropout": rng})
        return loss_of(logits, batch)

    def stateful_loss_fn(params: Any, state: Any, batch: Any, rng: Any) -> Any:
        logits, new = model.apply(
            {"params": params, "batch_stats": state},
            batch["x"],
            train=train,
            rngs={"dropout": rng},
            mutable=["batch_stats"],
        )
        return loss_of(logits, batch), new["batch_stats"]

    return Case(loss_fn if state is None else stateful_loss_fn, params, state, make_batch)


def dense_blocks(num_blocks: int = 6, width: int = 4, **options: Any) -> Case:
    """Residual blocks written without any library, with what `options` ask for.

    Options: dropout (rate), l2 (factor), tied (the last block uses the first one's weights), skip
    (the input is added to the last block's), bf16 (all parameters are cast first).
    """
    rng = np.random.default_rng(0)
    params = {
        f"block_{i}": {
            "w": (rng.normal(size=(width, width)) / width**0.5).astype(np.float32),
            "b": np.zeros(width, np.float32),
        }
        for i in range(num_blocks)
    }

    def loss_fn(params: Any, batch: Any, rng: Any) -> Any:
        l2 = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)) * options.get("l2", 0.0)
        if options.get("bf16"):
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        x = batch["x"]
        for i in range(num_blocks):
            p = params["block_0" if options.get("tied") and i == num_blocks - 1 else f"block_{i}"]
            x = x + jnp.tanh(x @ p["w"] + p["b"])
            if options.get("dropout"):
                keep = 1.0 - options["dropout"]
                mask = jax.random.bernoulli(jax.random.fold_in(rng, i), keep, x.shape)
                x = jnp.where(mask, x / keep, 0.0)
            if options.get("skip") and i == num_blocks - 2:
                x = x + batch["x"] @ params["block_0"]["w"]
        return jnp.mean((x - batch["y"]) ** 2).astype(batch["y"].dtype) + l2

    def make_batch(size: int, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return {name: rng.normal(size=(size, width)).astype(np.float32) for name in ("x", "y")}

    return Case(loss_fn, params, None, make_batch)


MODELS: dict[str, Callable[..., Case]] = {
    "transformer": transformer,
    "mlp": mlp,
    "vgg16": vgg,
    "vgg16_bn": functools.partial(vgg, batch_norm=True),
}
"""The models of `pdjax.models`, small. A new model takes one row."""


LARGE = ("transformer", "vgg16", "vgg16_bn")
"""Those that take long to compile."""


@contextmanager
def compiled_quickly(quickly: bool = True) -> Iterator[None]:
    """What is compiled inside is hardly optimised: that takes most of a test of a large model."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, quickly or before)
    try:
        yield
    finally:
        jax.config.update(name, before)


def graph_of(case: Case, batch_size: int, rng: jax.Array) -> LayerGraph:
    """The layers of a case, for a batch of `batch_size` examples."""
    batch, state = case.make_batch(batch_size, 0), case.model_state
    return build_graph(case.loss_fn, case.params, batch, rng, model_state=state)
