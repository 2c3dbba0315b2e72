"""Any optax transformation, cut into stages, does what it does to the whole tree."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import zoo

import pdjax
from pdjax.split.optimizer import split_update
from pdjax.trace import jaxprs

KEY = jax.random.key(0)


def is_matrix(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def by_kind(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", tree)


LEAF_BY_LEAF: dict[str, Any] = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2, eps=1e-3),
    "adamw, weights only": optax.adamw(1e-2, eps=1e-3, mask=is_matrix),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "lion": optax.lion(1e-3),
    "lamb": optax.lamb(1e-2, eps=1e-3),
    "schedule": optax.sgd(optax.linear_schedule(0.1, 0.0, 5)),
    "clipped leaf by leaf": optax.chain(optax.clip(0.1), optax.sgd(0.1)),
    "adaptive clipping": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "several by label": optax.multi_transform(
        {"matrix": optax.adam(1e-2, eps=1e-3), "vector": optax.sgd(0.1)}, by_kind
    ),
    "every second step": optax.MultiSteps(optax.adam(1e-2, eps=1e-3), 2).gradient_transformation(),
}
MIXING: dict[str, Any] = {
    "global norm": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, eps=1e-3)),
    "global norm afterwards": optax.chain(
        optax.scale_by_adam(eps=1e-3), optax.clip_by_global_norm(0.5), optax.scale(-0.1)
    ),
    "global norm twice": optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.scale_by_adam(eps=1e-3),
        optax.normalize_by_update_norm(),
        optax.scale(-0.1),
    ),
    "if finite": optax.apply_if_finite(optax.sgd(0.1), 3),
}


def run(case: zoo.Case, optimizer: Any, num_stages: int, **options: Any) -> tuple[Any, Any]:
    batches = [case.make_batch(4, seed) for seed in range(3)]
    pipe = pdjax.Pipeline(
        case.loss_fn, optimizer, num_stages=num_stages, num_microbatches=2, **options
    )
    state = pipe.init(case.params, batches[0], rng=KEY)
    for batch in batches:
        state, _ = pipe.step(state, batch)
    params, _, _ = oracle.replay_synchronous(case.loss_fn, optimizer, case.params, batches, 2, KEY)
    return pipe.params(state), params


@pytest.mark.grid(1)
@pytest.mark.parametrize("num_stages", [3, 1])
@pytest.mark.parametrize("name", [*LEAF_BY_LEAF, *MIXING])
def test_synchronous_updates_equal_those_of_the_whole_tree(name, num_stages):
    got, expected = run(zoo.dense_blocks(), {**LEAF_BY_LEAF, **MIXING}[name], num_stages)
    chex.assert_trees_all_close(got, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", *MIXING])
def test_tied_weights_get_the_sum_of_their_gradients(name):
    case = zoo.dense_blocks(tied=True, skip=True)
    got, expected = run(case, {**LEAF_BY_LEAF, **MIXING}[name], 4)
    chex.assert_trees_all_close(got, expected, atol=3e-6, rtol=1e-5)


def test_weights_tied_over_three_stages():
    def loss_fn(p, batch, rng):
        x = batch["x"]
        for i in range(4):
            x = jnp.tanh(jnp.tanh(x @ p["shared"]) @ p[f"own{i}"])
        return jnp.mean((x - batch["y"]) ** 2)

    rng = np.random.default_rng(0)
    names = ("shared", *(f"own{i}" for i in range(4)))
    params = {name: rng.normal(size=(4, 4)).astype(np.float32) for name in names}
    case = zoo.Case(loss_fn, params, None, zoo.dense_blocks().make_batch)
    got, expected = run(case, MIXING["global norm"], 3)
    chex.assert_trees_all_close(got, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LEAF_BY_LEAF)
def test_what_mixes_nothing_exchanges_nothing(name):
    case = zoo.dense_blocks()
    update = split_update(LEAF_BY_LEAF[name], case.params, *places(case))
    assert update.mixes is None
    assert all(len(stage.phases) == 1 for stage in update.stages)


def places(case: zoo.Case) -> tuple[Any, tuple[str, ...], int]:
    names = tuple(f"p{i}" for i in range(len(jax.tree.leaves(case.params))))
    return [(i * 3 // len(names),) for i in range(len(names))], names, 3


@pytest.mark.parametrize("name", LEAF_BY_LEAF)
def test_every_moment_lives_with_its_parameter_alone(name):
    """Only what is no larger than a number is kept by several stages."""
    case = zoo.dense_blocks()
    update = split_update(LEAF_BY_LEAF[name], case.params, *places(case))
    for index, var in enumerate(update.state):
        holders = [stage for stage in update.stages if index in stage.state]
        assert len(holders) == 1 or jaxprs.aval(var).shape == ()


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_is_found_by_data_flow(name):
    case = zoo.dense_blocks()
    update = split_update(MIXING[name], case.params, *places(case))
    assert update.mixes
    assert "depends on the gradient of 'p" in update.mixes


@pytest.mark.parametrize("name", ["global norm", "global norm afterwards"])
def test_only_numbers_are_exchanged(name):
    case = zoo.dense_blocks()
    update = split_update(MIXING[name], case.params, *places(case))
    assert [len(stage.phases) for stage in update.stages] == [2, 2, 2]
    for stage in update.stages:
        assert all(jaxprs.aval(var).shape == () for var in stage.phases[0].outputs["sends"])


@pytest.mark.parametrize("name", MIXING)
def test_asynchronous_schedules_refuse_what_mixes(name):
    case = zoo.dense_blocks()
    pipe = pdjax.Pipeline(case.loss_fn, MIXING[name], schedule="pipedream", num_stages=2)
    with pytest.raises(ValueError, match=r"mixes stages: .*'block_.*use a synchronous schedule"):
        pipe.init(case.params, case.make_batch(2, 0))


@pytest.mark.parametrize("name", LEAF_BY_LEAF)
def test_asynchronous_schedules_take_what_does_not(name):
    case = zoo.dense_blocks()
    optimizer = LEAF_BY_LEAF[name]
    batches = [case.make_batch(2, seed) for seed in range(5)]
    pipe = pdjax.Pipeline(case.loss_fn, optimizer, schedule="pipedream", num_stages=3)
    state = pipe.init(case.params, batches[0], rng=KEY)
    for batch in batches:
        state, _ = pipe.step(state, batch)
    state = pipe.drain(state)
    params, _, _ = oracle.replay_asynchronous(
        case.loss_fn, optimizer, case.params, batches, pipe.stage_of_parameters(), 3, KEY
    )
    chex.assert_trees_all_close(pipe.params(state), params, atol=5e-6, rtol=1e-5)


def test_a_state_that_begins_with_the_parameters():
    """It pulls the parameters back to where they began."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, p, p0: u - 0.1 * (p - p0), updates, params, state), state

    case = zoo.dense_blocks()
    pull = optax.GradientTransformation(lambda params: params, update)
    optimizer = optax.chain(optax.sgd(0.1), pull)
    got, expected = run(case, optimizer, 3)
    chex.assert_trees_all_close(got, expected, atol=3e-6, rtol=1e-5)
