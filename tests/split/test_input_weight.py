"""A backward pass in two parts: what each computes, and what waits in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from test_properties import KEY

from pdjax.split.differentiate import StagePrograms, differentiate
from pdjax.split.input_weight import InputWeightSplit, split_input_weight
from pdjax.split.stages import split
from pdjax.trace import dataflow, jaxprs
from pdjax.trace.layers import build_graph

FAST_KEY = jax.random.key(2, impl="unsafe_rbg")  # compiles in a fraction of the time
WIDTH, ROWS = 32, 2
WEIGHT_BYTES = WIDTH * WIDTH * 2  # of the smallest copy of one weight there could be, in bf16
RECTANGLE = np.ones((ROWS, WIDTH), np.float32)


def weights(count=6):
    rng = np.random.default_rng(0)
    return {f"w{i}": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for i in range(count)}


def chain(layer, num_layers=6):
    """A loss over layers of one weight each."""

    def loss_fn(p, x, rng):
        for i in range(num_layers):
            x = layer(p[f"w{i}"], x, jax.random.fold_in(rng, i))
        return jnp.mean(x.astype(jnp.float32) ** 2)

    return loss_fn


def plain(w, x, key):
    return jnp.tanh(x @ w)


def middle(loss_fn, params=None, batch: Any = RECTANGLE, starts=(0, 2, 4), remat: Any = "none"):
    """The programs of the second stage."""
    return stages_of(loss_fn, params or weights(), batch, starts, remat)[1][1]


def stages_of(loss_fn, params, batch, starts, remat: Any = "none", **options):
    stages = split(build_graph(loss_fn, params, batch, FAST_KEY, **options), starts)
    return stages, differentiate(stages, [remat] * len(starts))


# ---------------------------------------------------------------- what each part computes


def products(equations: Sequence[Any]) -> int:
    """Matrix products and convolutions, those inside loops and the like included."""
    heavy = ("dot_general", "conv_general_dilated")
    return sum(
        (e.primitive.name in heavy) + sum(products(inner.eqns) for inner in jaxprs.subprograms(e))
        for e in equations
    )


def counts(programs: StagePrograms) -> tuple[int, int, int]:
    """The products of the input part, the weight part and the undivided pass."""
    parts = split_input_weight(programs)
    runs = parts.input_part, parts.weight_part, programs.backward
    return tuple(products(run.equations) for run in runs)  # pyright: ignore[reportReturnType]


def dropped_out(w, x, key):
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), jnp.tanh(x @ w), 0)


def transposed_bf16(w, x, key):
    return jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16).T)


def normalised(w, x, key):
    return jnp.tanh(x @ (w / jnp.linalg.norm(w)))


def checkpointed(w, x, key):
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x)


def twice_checkpointed(w, x, key):
    return jax.checkpoint(lambda w, x: checkpointed(w, jnp.tanh(x @ w), key))(w, x)


@jax.custom_vjp
def with_own_rule(w, x):
    return jnp.tanh(x @ w)


def _own_forward(w, x):
    y = with_own_rule(w, x)
    return y, (w, x, y)


def _own_backward(saved, g):
    w, x, y = saved
    g = 2.0 * g * (1 - y**2)
    return x.T @ g, g @ w.T


with_own_rule.defvjp(_own_forward, _own_backward)


@pytest.mark.parametrize(
    ("layer", "remat", "expected"),
    [
        (plain, "none", (2, 2, 4)),
        (plain, "full", (4, 2, 6)),  # what is computed again is computed for the input part
        (jax.jit(plain), "none", (2, 2, 4)),
        (checkpointed, "none", (4, 2, 6)),
        (checkpointed, "full", (4, 2, 7)),  # the whole pass computes the first layer twice
        (twice_checkpointed, "none", (8, 4, 12)),
        (dropped_out, "none", (2, 2, 4)),
        (transposed_bf16, "none", (2, 2, 4)),
        (normalised, "none", (2, 2, 4)),
        (lambda w, x, key: with_own_rule(w, x), "none", (2, 2, 4)),
    ],
)
def test_products_of_two_layers(layer, remat, expected):
    """Of each layer one product is for its input and one for its weights."""
    assert counts(middle(chain(layer), remat=remat)) == expected


def test_what_only_the_weights_need_is_computed_again_for_them():
    """Between two products in a row no derivative needs the value, but the second weight does."""

    def block(w, x, key):
        return jax.checkpoint(lambda w, x: jnp.tanh((x @ w) @ w))(w, x)

    assert counts(middle(chain(block), starts=(0, 1, 2))) == (4, 2, 6)
    assert counts(middle(chain(lambda w, x, key: x @ w), remat="full")) == (2, 3, 5)


def test_products_of_a_transformer_block():
    """Six products with weights, and two of activations: scores, and scores times values."""
    case = zoo.transformer()
    graph = build_graph(case.loss_fn, case.params, case.make_batch(2, 0), KEY)
    starts = [graph.names.index(f"block_{i}/norm_attention") for i in (0, 1)]
    stages = split(graph, (0, *starts))
    assert counts(differentiate(stages, ("none", "none", "none"))[1]) == (10, 6, 16)
    again = counts(differentiate(stages, ("full", "full", "full"))[1])
    assert again[1] == 6
    assert sum(again) == 2 * again[2]


def test_products_of_convolutions():
    kernel = np.ones((3, 3, 4, 4), np.float32)
    params = {f"w{i}": kernel for i in range(6)}

    def layer(w, x, key):
        layout = ("NHWC", "HWIO", "NHWC")
        return jnp.tanh(
            jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)
        )

    batch = np.ones((2, 8, 8, 4), np.float32)
    assert counts(middle(chain(layer), params, batch)) == (2, 2, 4)


def test_the_first_stage_has_a_weight_part_only():
    _, (first, *_) = stages_of(chain(plain), weights(), RECTANGLE, (0, 2, 4))
    assert not first.gradient_receives
    assert counts(first) == (0, 3, 3)
    parts = split_input_weight(first)
    assert parts.early == ()
    assert parts.input_part.equations == ()
    assert parts.input_part.outputs["held"] == first.cotangents


def test_equations_that_nothing_needs_are_in_no_part():
    parts = split_input_weight(middle(chain(checkpointed)))
    for part in (parts.input_part, parts.weight_part):
        wanted = [atom for group in part.outputs.values() for atom in group]
        assert len(dataflow.needed(part.equations, wanted)) == len(part.equations)


# ---------------------------------------------------------------- loops and branches


def scanned(dtype=jnp.float32, decay=0.0):
    def loss_fn(p, x, rng):
        x = jnp.tanh(x @ p["first"])
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        stack = p["stack"].astype(dtype).astype(jnp.float32)
        x, _ = jax.lax.scan(step, x, stack)
        return jnp.mean((x @ p["last"]) ** 2) + decay * jnp.sum(p["stack"] ** 2)

    return loss_fn


STACKED = {
    "first": weights()["w0"],
    "stack": np.stack(list(weights().values())),
    "last": weights()["w1"],
}


@pytest.mark.filterwarnings("ignore::pdjax.PdjaxWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_loop_over_layers_is_in_the_input_part(dtype, decay):
    programs = middle(scanned(dtype, decay), STACKED, starts=(0, 1, 2))
    parts = split_input_weight(programs)
    assert counts(programs) == (2, 0, 2)
    assert (parts.early, parts.late) == ((0,), ())
    assert parts.input_part.outputs["held"] == ()
    assert parts.held_bytes == 0


@pytest.mark.filterwarnings("ignore::pdjax.PdjaxWarning")
def test_a_loop_that_is_computed_again_is_inlined_once():
    """Of `jax.checkpoint` around a loop the weight part of what follows it needs no loop."""

    def loss_fn(p, x, rng):
        @jax.checkpoint
        def block(stack, last, x):
            x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)
            return jnp.tanh(x @ last)

        x = jnp.tanh(x @ p["first"])
        x = block(p["stack"], p["last"], x)
        return jnp.mean((x @ p["end"]) ** 2)

    programs = middle(loss_fn, {**STACKED, "end": STACKED["last"]}, starts=(0, 1, 2))
    parts = split_input_weight(programs)
    assert len(parts.early) == len(parts.late) == 1  # of the loop's weights, and of the last ones
    assert counts(programs) == (1 + 1 + 3, 1, 6)
    assert [jaxprs.aval(v).shape for v in parts.input_part.outputs["held"]] == [(ROWS, WIDTH)] * 2


def test_a_branch_stays_whole():
    def layer(w, x, key):
        return jax.lax.cond(x[0, 0] > 0, lambda w, x: jnp.tanh(x @ w), lambda w, x: x @ w, w, x)

    parts = split_input_weight(middle(chain(layer)))
    assert (parts.early, parts.late) == ((0, 1), ())
    assert parts.weight_part.equations == ()


# ---------------------------------------------------------------- what waits in between


def test_what_waits_for_the_weight_part_of_a_layer():
    """Of each layer its input and the cotangent of its product."""
    parts = split_input_weight(middle(chain(plain)))
    held = parts.input_part.outputs["held"]
    assert len(held) == len(parts.kept) == 2
    assert {jaxprs.aval(var).shape for var in held} == {(ROWS, WIDTH)}
    assert parts.held_bytes == 4 * ROWS * WIDTH * 4


@pytest.mark.parametrize("remat", ["none", "full", jax.checkpoint_policies.dots_saveable])
@pytest.mark.parametrize(
    "layer", [plain, transposed_bf16, normalised, checkpointed, twice_checkpointed]
)
def test_no_weight_is_held(layer, remat):
    parts = split_input_weight(middle(chain(layer), remat=remat))
    held = parts.input_part.outputs["held"]
    assert 0 < parts.held_bytes < 2 * WEIGHT_BYTES
    assert (WIDTH, WIDTH) not in {jaxprs.aval(var).shape for var in held}


LAYERS = [plain, normalised, transposed_bf16, dropped_out, checkpointed, twice_checkpointed]


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_of_a_microbatch_is_computed_twice(layer, remat):
    """What both parts run is made of parameters and constants."""
    programs = middle(chain(layer), remat=remat)
    parts = split_input_weight(programs)
    assert_disjoint(programs, parts)
    both = set(parts.input_part.equations) & set(parts.weight_part.equations)
    if layer is normalised:
        assert any(e.primitive.name == "sqrt" for e in both)


def assert_disjoint(programs: StagePrograms, parts: InputWeightSplit) -> None:
    both = set(parts.input_part.equations) & set(parts.weight_part.equations)
    allowed = {*programs.inputs["params"], *programs.inputs["consts"], programs.seed}
    in_order = [e for e in parts.weight_part.equations if e in both]
    assert set(dataflow.free_variables(in_order, [])) <= allowed
    saved = {programs.forward.outputs["saved"][at] for at in parts.kept}
    inputs = {var for name, group in programs.inputs.items() if name != "receives" for var in group}
    held = parts.input_part.outputs["held"]
    assert set(parts.weight_part.reads) <= {*inputs, *saved, *held, programs.seed}
    assert len(set(held)) == len(held)


def test_a_mask_of_the_key_is_not_made_for_the_weights():
    programs = middle(chain(dropped_out))
    parts = split_input_weight(programs)
    assert programs.inputs["key"][0] in parts.input_part.reads
    assert programs.inputs["key"][0] not in parts.weight_part.reads


def test_a_gradient_that_is_a_cotangent_is_not_held():
    params = {f"w{i}": RECTANGLE for i in range(6)}

    parts = split_input_weight(middle(chain(lambda w, x, key: jnp.tanh(x + w)), params))
    assert (parts.early, parts.late) == ((0, 1), ())
    assert parts.held_bytes == 0


def test_gradients_of_a_scaled_penalty_are_made_late():
    """The cotangent of the penalty is a scalar: it is held, rather than the gradient."""

    def loss_fn(p, x, rng):
        penalty = sum(jnp.sum(w**2) for w in p.values())
        return chain(plain)(p, x, rng) * (1 + penalty)

    parts = split_input_weight(middle(loss_fn))
    assert parts.late == (0, 1)
    shapes = [jaxprs.aval(var).shape for var in parts.input_part.outputs["held"]]
    assert sorted(shapes) == [(), (ROWS, WIDTH), (ROWS, WIDTH)]


def test_unused_and_shared_weights():
    def loss_fn(p, x, rng):
        x = jnp.tanh(x @ p["w0"])
        x = jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w1"]) * jax.lax.stop_gradient(p["w2"][0])
        return jnp.mean((x @ p["w3"]) ** 2)

    programs = middle(loss_fn, weights(4), starts=(0, 1, 2))
    parts = split_input_weight(programs)
    assert counts(programs) == (2, 2, 4)
    assert len(parts.late) == len(programs.stage.params) == 2
    assert_disjoint(programs, parts)


# ---------------------------------------------------------------- side effects


def test_side_effects_happen_once_and_pull_no_gradient_forward():
    @jax.custom_vjp
    def observed(w, x):
        return jnp.tanh(x @ w)

    def forward(w, x):
        y = observed(w, x)
        return y, (w, x, y)

    def backward(saved, g):
        w, x, y = saved
        g = g * (1 - y**2)
        gradient = x.T @ g
        jax.debug.callback(lambda value: seen.append("cotangent"), g[0, 0])
        jax.debug.callback(lambda value: seen.append("gradient"), gradient[0, 0])
        return gradient, g @ w.T

    observed.defvjp(forward, backward)
    seen: list[str] = []
    programs = middle(chain(lambda w, x, key: observed(w, x)))
    parts = split_input_weight(programs)
    assert counts(programs) == (2, 2, 4)
    effects = [
        sum(map(jaxprs.has_effects, part.equations))
        for part in (parts.input_part, parts.weight_part, programs.backward)
    ]
    assert effects == [2, 2, 4]
    values: dict[Any, Any] = {
        var: jnp.ones(jaxprs.aval(var).shape) for var in programs.backward.reads
    }
    made = parts.input_part.run(values)
    jax.effects_barrier()
    assert seen == ["cotangent"] * 2
    values |= zip(parts.input_part.outputs["held"], made["held"], strict=True)
    parts.weight_part.run(values)
    jax.effects_barrier()
    assert sorted(seen) == ["cotangent"] * 2 + ["gradient"] * 2


def test_a_callback_is_not_called_again_for_the_weights():
    """It reads parameters alone, but what it says may differ from one microbatch to the next."""
    shape = jax.ShapeDtypeStruct((), jnp.float32)

    @jax.checkpoint
    def product(w, x):
        scale = jax.pure_callback(lambda w: np.float32(2), shape, jax.lax.stop_gradient(w))
        return x @ (w * scale)

    programs = middle(chain(lambda w, x, key: jnp.tanh(product(w, x))))
    parts = split_input_weight(programs)
    calls = [
        sum(map(jaxprs.has_effects, part.equations))
        for part in (parts.input_part, parts.weight_part)
    ]
    assert calls == [2, 0]
    held = parts.input_part.outputs["held"]
    assert sorted(jaxprs.aval(var).shape for var in held) == [(), (), (ROWS, WIDTH), (ROWS, WIDTH)]
    assert_disjoint(programs, parts)
