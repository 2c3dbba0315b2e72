"""What a forward pass hands to its backward pass."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from pdjax.split.differentiate import StagePrograms, differentiate
from pdjax.split.stages import split
from pdjax.trace import jaxprs
from pdjax.trace.layers import build_graph

KEY = jax.random.key(0)
WIDTH, ROWS = 32, 2
WEIGHT_BYTES = WIDTH * WIDTH * 2  # of the smallest copy of one weight there could be, in bf16


def programs(loss_fn, params, starts=(0, 2, 4), stage=1, remat: Any = "none") -> StagePrograms:
    batch = np.ones((ROWS, WIDTH), np.float32)
    stages = split(build_graph(loss_fn, params, batch, KEY), starts)
    return differentiate(stages, [remat] * len(starts))[stage]


def weights(count=6):
    rng = np.random.default_rng(0)
    return {f"w{i}": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for i in range(count)}


def plain(p, x, rng):
    for i in range(6):
        x = jnp.tanh(x @ p[f"w{i}"])
    return jnp.mean(x**2)


def transposed(p, x, rng):
    for i in range(6):
        x = jnp.tanh(x @ p[f"w{i}"].T)
    return jnp.mean(x**2)


def cast(p, x, rng):
    return plain(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), x, rng).astype(jnp.float32)


def cast_and_transposed(p, x, rng):
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
    return transposed(low, x.astype(jnp.bfloat16), rng).astype(jnp.float32)


def rescaled(p, x, rng):
    return plain(jax.tree.map(lambda w: w / jnp.linalg.norm(w), p), x, rng)


def with_remat(p, x, rng):
    layer = jax.checkpoint(lambda w, x: jnp.tanh(x @ w.astype(jnp.bfloat16).T))
    for i in range(6):
        x = layer(p[f"w{i}"], x)
    return jnp.mean(x**2).astype(jnp.float32)


def with_branches(p, x, rng):
    for i in range(6):
        x = jax.lax.cond(
            x[0, 0] > 0, lambda w, x: jnp.tanh(x @ w), lambda w, x: x @ w, p[f"w{i}"], x
        )
    return jnp.mean(x**2)


@pytest.mark.parametrize("remat", ["none", "full", jax.checkpoint_policies.dots_saveable])
@pytest.mark.parametrize(
    "loss_fn",
    [plain, transposed, cast, cast_and_transposed, rescaled, with_remat, with_branches],
)
def test_no_weight_is_returned_by_a_forward_pass(loss_fn, remat):
    made = programs(loss_fn, weights(), remat=remat)
    returned = {id(atom): atom for group in made.forward.outputs.values() for atom in group}
    assert returned
    assert sum(map(jaxprs.num_bytes, returned.values())) < WEIGHT_BYTES
    shapes = {jaxprs.aval(atom).shape for atom in returned.values()}
    assert (WIDTH, WIDTH) not in shapes


def scanned(dtype):
    def loss_fn(p, x, rng):
        x = jnp.tanh(x @ p["first"])
        step = lambda x, w: (jnp.tanh(x @ w.astype(dtype).astype(x.dtype)), None)  # noqa: E731
        x, _ = jax.lax.scan(step, x, p["stack"])
        return jnp.mean((x @ p["last"]) ** 2)

    return loss_fn


@pytest.mark.filterwarnings("ignore::pdjax.PdjaxWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_weight_is_returned_by_a_loop(dtype):
    params = {
        "first": weights()["w0"],
        "stack": np.stack(list(weights().values())),
        "last": weights()["w1"],
    }
    made = programs(scanned(dtype), params, starts=(0, 1, 2))
    returned = [atom for group in made.forward.outputs.values() for atom in group]
    assert sum(map(jaxprs.num_bytes, returned)) < 6 * WEIGHT_BYTES


def test_dropout_masks_are_made_again_not_stored():
    def loss_fn(p, x, rng):
        for i in range(6):
            keep = jax.random.bernoulli(jax.random.fold_in(rng, i), 0.5, x.shape)
            x = jnp.where(keep, x @ p[f"w{i}"], 0)
        return jnp.mean(x**2)

    made = programs(loss_fn, weights())
    assert made.inputs["key"]
    assert made.inputs["key"][0] in made.backward.reads
    assert not any(jaxprs.aval(var).dtype == bool for var in made.forward.outputs["saved"])


def test_nothing_cheap_is_stored():
    """Of gelu after a product it takes the product and one tanh, not every step in between."""

    def loss_fn(p, x, rng):
        for i in range(6):
            x = nn.gelu(x @ p[f"w{i}"])
        return jnp.mean(x**2)

    made = programs(loss_fn, weights())
    assert len(made.forward.outputs["saved"]) == 5  # the input, and two for each of two layers
    assert made.saved_bytes == 5 * ROWS * WIDTH * 4


def test_products_are_not_repeated_and_exponentials_neither():
    made = programs(plain, weights())
    names = [equation.primitive.name for equation in made.backward.equations]
    assert names.count("dot_general") == 4  # two for each layer: for the weights and for the input
    assert "tanh" not in names


def test_full_recomputation_stores_the_input_only():
    made = programs(plain, weights(), remat="full")
    assert [jaxprs.aval(v).shape for v in made.forward.outputs["saved"]] == [(ROWS, WIDTH)]
    names = [equation.primitive.name for equation in made.backward.equations]
    assert names.count("dot_general") == 6  # both products again


def test_a_policy_decides_what_is_stored():
    def loss_fn(p, x, rng):
        for i in range(6):
            x = checkpoint_name(jnp.tanh(x @ p[f"w{i}"]), f"y{i}")
        return jnp.mean(x**2)

    policy = jax.checkpoint_policies.save_only_these_names("y2")
    everything = programs(loss_fn, weights(), remat=jax.checkpoint_policies.everything_saveable)
    one = programs(loss_fn, weights(), remat=policy)
    assert len(everything.forward.outputs["saved"]) > 3
    assert len(one.forward.outputs["saved"]) == 2  # the named value, and the stage's input


def test_policies_that_offload_are_refused():
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["y"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def loss_fn(p, x, rng):
        for i in range(6):
            x = checkpoint_name(jnp.tanh(x @ p[f"w{i}"]), "y")
        return jnp.mean(x**2)

    with pytest.raises(ValueError, match="Policies that offload are not supported"):
        programs(loss_fn, weights(), remat=policy)


def test_arrays_that_nested_functions_close_over_are_part_of_the_programs():
    """`jax.checkpoint` and rules of `jax.custom_vjp` hide them until they are differentiated."""
    table = np.eye(WIDTH, dtype=np.float32)

    @jax.custom_vjp
    def with_rule(x):
        return x @ table

    def backward(_, g):
        return (g @ jnp.asarray(table).T,)

    with_rule.defvjp(lambda x: (with_rule(x), None), backward)
    nested = jax.jit(lambda x: with_rule(jnp.tanh(x @ table)))

    def loss_fn(p, x, rng):
        for i in range(6):
            x = jax.checkpoint(lambda w, x: nested(x @ w))(p[f"w{i}"], x)
        return jnp.mean(x**2)

    made = programs(loss_fn, weights())
    given = {var for group in made.inputs.values() for var in group}
    assert set(made.forward.reads) <= given
    assert set(made.backward.reads) <= {*given, *made.cotangents, *made.forward.outputs["saved"]}
    assert set(made.fused.reads) <= {*given, *made.cotangents}
