"""The models: every row of the table, and what is particular to each model."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pdjax import data
from pdjax.models import MODELS, ModelSpec, build_model
from pdjax.models.mlp import MLPBlock

NUM_CLASSES = 10

# Sizes that run in a moment. A model that is small by default needs no row here.
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {"width": 16, "num_heads": 2, "num_blocks": 2, "max_length": 16},
    "mlp": {"width": 16, "num_blocks": 2},
    "vgg16": {"width_multiplier": 1 / 16, "dense_width": 16},
    "vgg16_bn": {"width_multiplier": 1 / 16, "dense_width": 16},
}

every_model = pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)


def small(name: str, **overrides: Any) -> Any:
    """A model small enough for a test; any type, because `apply` returns one or two things."""
    return build_model(name, NUM_CLASSES, **{**SMALL.get(name, {}), **overrides})


def example_input(spec: ModelSpec) -> np.ndarray:
    """A batch of two that the model takes."""
    rng = np.random.default_rng(0)
    if spec.takes == "text":
        return rng.integers(NUM_CLASSES, size=(2, 12), dtype=np.int32)
    side = spec.image_size or 8
    return rng.random((2, side, side, 3), np.float32)


def key(seed: int) -> jax.Array:
    """A random key of the kind that is quickest to compile."""
    return jax.random.key(seed, impl="unsafe_rbg")


def apply(model: Any, variables: Any, x: np.ndarray, **kwargs: Any) -> Any:
    """``model.apply`` in one compiled piece, to numpy: both save compiling many small ones."""
    return jax.device_get(jax.jit(functools.partial(model.apply, **kwargs))(variables, x))


def init(model: Any, x: np.ndarray) -> Any:
    """Variables of the model."""
    return jax.device_get(jax.jit(model.init)(key(1), x))


@functools.cache
def variables_of(name: str) -> Any:
    """The variables of the small model, whatever its dropout and dtype."""
    return init(small(name), example_input(MODELS[name]))


def num_parameters(model: Any, x: jax.ShapeDtypeStruct) -> int:
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@every_model
def test_every_model_maps_its_input_to_logits(spec: ModelSpec):
    model, x = small(spec.name), example_input(spec)
    logits = apply(model, variables_of(spec.name), x, train=False)
    assert logits.shape == (*(x.shape if spec.takes == "text" else x.shape[:1]), NUM_CLASSES)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


@every_model
def test_every_model_has_a_gradient(spec: ModelSpec):
    model, x, variables = small(spec.name), example_input(spec), variables_of(spec.name)
    state = {name: value for name, value in variables.items() if name != "params"}

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, _ = model.apply(
                {"params": params, **state},
                x,
                train=True,
                rngs={"dropout": key(2)},
                mutable=list(state),
            )
            return (logits**2).mean()

        return jax.grad(loss)(params)

    gradients = jax.device_get(gradient(variables["params"]))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    for part in gradients.values():
        assert any(g.any() for g in jax.tree.leaves(part))


@every_model
def test_dropout_is_on_in_training_only(spec: ModelSpec):
    model, x = small(spec.name, dropout=0.5), example_input(spec)
    variables = variables_of(spec.name)

    @jax.jit
    def logits(seed: jax.Array) -> jax.Array:
        return model.apply(
            variables, x, train=True, rngs={"dropout": seed}, mutable=["batch_stats"]
        )[0]

    first, again, other = (np.asarray(logits(key(seed))) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    for evaluation in ({}, {"train": False}):  # would raise if it asked for a key
        jax.eval_shape(functools.partial(model.apply, **evaluation), variables, x)


@every_model
def test_computes_in_bfloat16_on_request_with_float32_parameters(spec: ModelSpec):
    model, x = small(spec.name, dtype=jnp.bfloat16), example_input(spec)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    jaxpr = jax.make_jaxpr(lambda v: model.apply(v, x))(variables)
    products = [
        e for e in jaxpr.eqns if e.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert products
    assert all(e.outvars[0].aval.dtype == jnp.bfloat16 for e in products)
    assert jaxpr.out_avals[0].dtype == jnp.float32


@every_model
def test_every_override_is_a_field_that_takes_effect(spec: ModelSpec):
    assert "num_classes" not in spec.fields
    assert spec.classes_field not in spec.fields
    for field in spec.fields:
        value = object()
        assert getattr(spec.build(NUM_CLASSES, **{field: value}), field) is value


def test_specs_are_named_as_in_the_table_and_frozen():
    assert {name: spec.name for name, spec in MODELS.items()} == {name: name for name in MODELS}
    assert all(spec.description and "\n" not in spec.description for spec in MODELS.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODELS["mlp"].name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_table_holds_the_models():
    assert {"transformer", "mlp", "vgg16", "vgg16_bn"} <= set(MODELS)
    assert MODELS["transformer"].takes == "text"
    assert MODELS["vgg16"].image_size == 32
    assert MODELS["mlp"].image_size is None
    assert build_model("transformer", 256).vocab_size == 256
    assert not build_model("vgg16", 10).batch_norm
    assert build_model("vgg16_bn", 10).batch_norm


def test_unknown_model_names_the_nearest_and_lists_all():
    with pytest.raises(ValueError, match="'transformr', did you mean 'transformer'") as error:
        build_model("transformr", NUM_CLASSES)
    assert all(name in str(error.value) for name in MODELS)


def test_unknown_model_far_from_all_suggests_none():
    with pytest.raises(ValueError, match="unknown model 'xyz'; the models are transformer, mlp"):
        build_model("xyz", NUM_CLASSES)


def test_unknown_override_lists_the_fields():
    with pytest.raises(ValueError, match="cannot override 'widht', did you mean 'width'") as error:
        build_model("mlp", NUM_CLASSES, widht=3)
    assert "width, num_blocks, dropout, dtype" in str(error.value)
    with pytest.raises(ValueError, match="cannot override 'vocab_size'"):
        build_model("transformer", NUM_CLASSES, vocab_size=3)


def test_transformer_parameters():
    params = variables_of("transformer")["params"]
    assert set(params) == {"embed", "positions", "block_0", "block_1", "norm", "head"}
    assert set(params["block_0"]) == {
        "norm_attention",
        "attention",
        "norm_mlp",
        "mlp_in",
        "mlp_out",
    }
    assert params["embed"]["embedding"].shape == (NUM_CLASSES, 16)
    assert params["positions"]["embedding"].shape == (16, 16)
    assert params["block_1"]["mlp_in"]["kernel"].shape == (16, 64)
    assert params["head"]["kernel"].shape == (16, NUM_CLASSES)


def test_transformer_with_tied_embeddings_has_no_head():
    model, x = small("transformer", tie_embeddings=True), example_input(MODELS["transformer"])
    variables = init(model, x)
    assert "head" not in variables["params"]
    logits, state = apply(model, variables, x, capture_intermediates=True)
    (last,) = state["intermediates"]["norm"]["__call__"]
    table = variables["params"]["embed"]["embedding"]
    assert np.allclose(logits, last @ table.T, atol=1e-6)


def test_transformer_is_causal_and_knows_positions():
    model, x = small("transformer"), example_input(MODELS["transformer"])
    variables = variables_of("transformer")
    tokens, constant = x[0], np.zeros_like(x[0])
    changed = np.where(np.arange(len(tokens)) == 5, (tokens + 1) % NUM_CLASSES, tokens)
    before, after, same = apply(model, variables, np.stack([tokens, changed, constant]))
    assert (before[:5] == after[:5]).all()
    assert (before[5:] != after[5:]).any(axis=-1).all()
    assert not np.allclose(same[0], same[1])


@pytest.mark.parametrize(
    ("x", "overrides", "message"),
    [
        (np.zeros((2, 17), np.int32), {}, "17 tokens, expected at most max_length=16"),
        (np.zeros(4, np.int32), {}, r"shape \(4,\), expected integers \[batch, sequence\]"),
        (np.zeros((2, 4), np.float32), {}, "float32 tokens"),
        (np.zeros((2, 4), np.int32), {"num_heads": 3}, "width=16 with num_heads=3"),
    ],
)
def test_transformer_refuses(x: np.ndarray, overrides: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        small("transformer", **overrides).init(jax.random.key(0), x)


def test_transformer_learns():
    dataset = data.load("synthetic-text", seed=0, sequence_length=16)
    model: Any = build_model(
        "transformer", dataset.num_classes, width=32, num_blocks=1, dropout=0.0
    )
    batches = data.batches(dataset.train, 32)
    params = init(model, next(batches)["x"])["params"]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any, batch: data.Example) -> tuple[Any, Any, jax.Array]:
        def loss_fn(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, batch["x"], train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    state, loss = optimizer.init(params), jnp.inf
    for _, batch in zip(range(80), batches, strict=False):
        params, state, loss = step(params, state, batch)
    assert 1.1 < loss < 1.7  # 4.16 without having learned, 1.21 at best


def test_mlp_parameters():
    params = variables_of("mlp")["params"]
    assert set(params) == {"embed", "block_0", "block_1", "head"}
    assert params["embed"]["kernel"].shape == (8 * 8 * 3, 16)
    assert params["block_1"]["mlp_in"]["kernel"].shape == (16, 64)
    assert params["block_1"]["mlp_out"]["kernel"].shape == (64, 16)


def test_mlp_stays_finite_when_deep():
    block, x = MLPBlock(), np.ones((2, 16), np.float32)
    params = init(block, x)
    deep = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, y: block.apply(params, y), x))
    assert float(np.abs(deep(x)).max()) < 1000


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_vgg_parameters(name: str):
    variables = variables_of(name)
    batch_norms = {f"bn_{i}" for i in range(13)} if name == "vgg16_bn" else set()
    convs = {f"conv_{i}" for i in range(13)}
    assert set(variables["params"]) == convs | batch_norms | {"dense_0", "dense_1", "head"}
    assert set(variables.get("batch_stats", {})) == batch_norms
    channels = [variables["params"][f"conv_{i}"]["kernel"].shape[-1] for i in range(13)]
    assert channels == [4, 4, 8, 8, 16, 16, 16, 32, 32, 32, 32, 32, 32]


def test_vgg_has_as_many_parameters_as_published():
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    plain, normed = (num_parameters(build_model(n, 1000), images) for n in ("vgg16", "vgg16_bn"))
    assert plain == 138_357_544
    assert normed == plain + 4224  # scale and shift of each channel in place of its bias


def test_vgg_keeps_moving_averages_in_training_only():
    model, x = small("vgg16_bn", dropout=0.0), example_input(MODELS["vgg16_bn"])
    variables = variables_of("vgg16_bn")
    logits, trained = apply(model, variables, x, train=True, mutable=["batch_stats"])
    other_logits, evaluated = apply(model, variables, x, train=False, mutable=["batch_stats"])
    assert not np.allclose(logits, other_logits)
    old, new = variables["batch_stats"]["bn_0"]["mean"], trained["batch_stats"]["bn_0"]["mean"]
    conv = nn.Conv(4, (3, 3), use_bias=False)
    outputs = apply(conv, {"params": variables["params"]["conv_0"]}, x)
    assert np.allclose(new, 0.9 * old + 0.1 * outputs.mean((0, 1, 2)), atol=1e-6)
    same = jax.tree.map(np.array_equal, evaluated["batch_stats"], variables["batch_stats"])
    assert jax.tree.all(same)


@pytest.mark.parametrize("height", [32, 50, 64])
def test_vgg_takes_any_size_from_32(height: int):
    shape = jax.ShapeDtypeStruct((1, height, 32, 1), jnp.float32)
    params = jax.eval_shape(small("vgg16").init, jax.random.key(0), shape)["params"]
    assert params["dense_0"]["kernel"].shape == ((height // 32) * 32, 16)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 32, 31, 3), "got images of 32 × 31 pixels, expected at least 32 × 32"),
        ((32, 32, 3), "expected .batch, height, width, channels"),
    ],
)
def test_vgg_refuses(shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        small("vgg16").init(jax.random.key(0), np.zeros(shape, np.float32))
