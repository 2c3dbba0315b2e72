"""Layers: their names, their order, what is refused."""

from __future__ import annotations

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import nnx

import pdjax
from pdjax.trace.layers import LayerGraph, build_graph

KEY = jax.random.key(0)


def graph_of(case: zoo.Case) -> LayerGraph:
    return zoo.graph_of(case, zoo.MICROBATCH, KEY)


def test_linen_layers_are_named_by_module_path():
    names = graph_of(zoo.transformer()).names
    block = [
        "norm_attention",
        "attention/query",
        "attention/key",
        "attention/value",
        "attention/out",
        "norm_mlp",
        "mlp_in",
        "mlp_out",
    ]
    expected = ["embed", *(f"block_{i}/{part}" for i in range(2) for part in block), "norm", "head"]
    assert list(names) == expected


def test_a_module_called_by_another_method_and_tied_is_a_layer_of_its_own():
    names = graph_of(zoo.transformer(tie_embeddings=True)).names
    assert names[0] == "embed"
    assert names[-1] == "embed.attend"


def test_nnx_layers_are_named_by_parameter_path():
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
            self.norm = nnx.LayerNorm(4, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            for block in self.blocks:
                x = nnx.relu(block(x))
            return self.norm(x)

    def loss_fn(model, batch):
        return jnp.mean(model(batch) ** 2)

    f = pdjax.nnx.functionalize(Model(nnx.Rngs(0)), loss_fn)
    graph = build_graph(f.loss_fn, f.params, jnp.ones((2, 4)), KEY, model_state=f.model_state)
    assert graph.names == ("blocks/0", "blocks/1", "blocks/2", "norm")
    assert graph.layers[0].params == ("blocks/0/bias", "blocks/0/kernel")


def test_plain_functions_are_named_by_parameters():
    def loss_fn(p, batch, rng):
        x = jnp.tanh(batch @ p["w"]) @ p["later"][0]["w"]
        return jnp.mean((x + p["later"][0]["b"]) ** 2)

    params = {"w": jnp.ones((3, 3)), "later": [{"w": jnp.ones((3, 3)), "b": jnp.ones(3)}]}
    assert build_graph(loss_fn, params, jnp.ones((2, 3)), KEY).names == ("w", "later/0")


def test_a_module_used_again_gets_a_number():
    def loss_fn(p, batch, rng):
        x = batch
        for name in ("a", "b", "a"):
            x = jnp.tanh(x @ p[name]["w"])
        return jnp.mean(x**2)

    params = {name: {"w": jnp.ones((3, 3))} for name in "ab"}
    assert build_graph(loss_fn, params, jnp.ones((2, 3)), KEY).names == ("a", "b", "a#2")


def test_a_remat_block_is_named_by_its_parameters():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.tanh(nn.Dense(4)(nn.Dense(4)(x)))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for i in range(2):
                x = nn.remat(Block)(name=f"block_{i}")(x)
            return x

    model = Model()
    params = model.init(KEY, jnp.ones((2, 4)))

    def loss_fn(params: Any, batch: Any, rng: Any) -> Any:
        output: Any = model.apply(params, batch)
        return jnp.mean(output**2)

    assert build_graph(loss_fn, params, jnp.ones((2, 4)), KEY).names == ("block_0", "block_1")


def test_layers_cover_the_line_in_order():
    graph = graph_of(zoo.vgg(batch_norm=True))
    assert [layer.start for layer in graph.layers[1:]] == [
        layer.stop for layer in graph.layers[:-1]
    ]
    assert graph.layers[0].start == 0
    assert graph.layers[-1].stop == len(graph.line)


def test_equal_blocks_have_equal_fingerprints():
    layers = {layer.name: layer.fingerprint for layer in graph_of(zoo.transformer()).layers}
    assert layers["block_0/mlp_in"] == layers["block_1/mlp_in"]
    assert layers["block_0/mlp_in"] != layers["block_0/mlp_out"]


def test_sizes_of_a_layer():
    def loss_fn(p, batch, rng):
        x = batch @ p["a"]
        return jnp.mean((jnp.tanh(x) @ p["b"] + x) ** 2)

    params = {"a": jnp.ones((3, 5)), "b": jnp.ones((5, 5))}
    first, second = build_graph(loss_fn, params, jnp.ones((2, 3)), KEY).layers
    assert first.param_bytes == 60
    assert first.flops == 2 * 2 * 3 * 5 + 10  # the product, then tanh of what it made
    assert first.cut_bytes == 2 * 5 * 4 * 2  # x and its tanh
    assert second.cut_bytes == 0


def test_json():
    graph = graph_of(zoo.mlp())
    assert [layer["name"] for layer in json.loads(graph.to_json())] == list(graph.names)


# ---------------------------------------------------------------- what is refused

PARAMS = {"w": np.ones((3, 3), np.float32)}
BATCH = np.ones((2, 3), np.float32)


def ordered_print(p, batch, rng):
    jax.debug.print("{}", batch, ordered=True)
    return jnp.mean(batch @ p["w"])


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda p, b, r: b @ p["w"], r"must be a real scalar; loss_fn returned float32\[2, 3\]"),
        (lambda p, b, r: jnp.argmax(b @ p["w"]), "must be a real scalar"),
        (lambda p, b, r: {"loss": jnp.mean(b @ p["w"])}, "returned a dict"),
        (lambda p, b, r: (None, {}), "must be a real scalar"),
        (lambda p, b, r: jnp.mean(b), "depends on no parameter"),
        (lambda p, b, r: jnp.float32(1.0), "depends on no parameter"),
        (ordered_print, "an ordered side effect .*unordered"),
    ],
)
def test_loss_functions_that_make_no_sense(loss_fn, message):
    with pytest.raises(ValueError, match=message):
        build_graph(loss_fn, PARAMS, BATCH, KEY)


def test_parameters_without_gradient():
    params = {"w": PARAMS["w"], "count": np.int32(3)}
    with pytest.raises(ValueError, match="'count' has dtype int32, which has no gradient"):
        build_graph(lambda p, b, r: jnp.mean(b @ p["w"]), params, BATCH, KEY)


def test_no_parameters():
    with pytest.raises(ValueError, match="holds no arrays"):
        build_graph(lambda p, b, r: jnp.mean(b), {}, BATCH, KEY)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda p, s, b, r: jnp.mean(b @ p["w"]), "must return .loss, new_state."),
        (lambda p, s, b, r: (jnp.mean(b @ p["w"]), {"other": s["ema"]}), "has the structure"),
        (lambda p, s, b, r: (jnp.mean(b @ p["w"]), {"ema": s["ema"][:1]}), "the same shape"),
    ],
)
def test_new_states_that_make_no_sense(loss_fn, message):
    with pytest.raises(ValueError, match=message):
        build_graph(loss_fn, PARAMS, BATCH, KEY, model_state={"ema": np.ones(2, np.float32)})


def test_a_weight_is_asked_for_and_missing():
    with pytest.raises(ValueError, match=r"must be a pair \(sum, weight\)"):
        build_graph(lambda p, b, r: jnp.mean(b @ p["w"]), PARAMS, BATCH, KEY, weighted_loss=True)
