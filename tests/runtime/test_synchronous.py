"""Under a synchronous schedule a pipeline computes what one device computes.

The model with BatchNorm in float64: over microbatches of two examples it multiplies the rounding of
an operation by thousands, so that in float32 only bounds would hold that an error could pass too.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import oracle
import pytest
import zoo

import pdjax
from pdjax.schedules import ALGORITHMS
from pdjax.schedules.versions import peak_in_flight

SYNCHRONOUS = [
    name for name, algorithm in ALGORITHMS.items() if algorithm.weight_rule == pdjax.LATEST
]
CHUNKS = {name: algorithm.num_chunks for name, algorithm in ALGORITHMS.items()}
SIZES = [(n, m) for n in range(1, 5) for m in range(1, 6)]
FEW_SIZES = [(1, 3), (2, 5), (3, 2), (4, 4)]
STEPS = 2
OPTIMIZER = optax.sgd(0.5, momentum=0.9)
KEY = jax.random.key(7)


DOUBLE = "vgg16_bn"


@functools.cache
def case_of(model: str) -> zoo.Case:
    if model == DOUBLE:
        return zoo.MODELS[model](dtype="float64").double()
    return zoo.MODELS[model]()


@functools.cache
def batches_of(model: str, num_microbatches: int) -> list[Any]:
    size = num_microbatches * zoo.MICROBATCH
    return [case_of(model).make_batch(size, seed) for seed in range(STEPS)]


@functools.cache
def expected(model: str, num_microbatches: int) -> tuple[Any, list[Any], Any]:
    case = case_of(model)
    return oracle.replay_synchronous(
        case.loss_fn,
        OPTIMIZER,
        case.params,
        batches_of(model, num_microbatches),
        num_microbatches,
        KEY,
        case.model_state,
    )


@pytest.mark.grid(2)
@pytest.mark.parametrize(
    ("model", "num_workers", "num_microbatches"),
    [(model, *size) for model in zoo.MODELS for size in (SIZES if model == "mlp" else FEW_SIZES)],
)
@pytest.mark.parametrize("schedule", SYNCHRONOUS)
def test_equals_one_device(model, schedule, num_workers, num_microbatches):
    with jax.enable_x64(model == DOUBLE), zoo.compiled_quickly(model in zoo.LARGE):
        compare_with_one_device(model, schedule, num_workers, num_microbatches)


def compare_with_one_device(model, schedule, num_workers, num_microbatches):
    case = case_of(model)
    num_stages = num_workers * CHUNKS[schedule]
    pipe = pdjax.Pipeline(
        case.loss_fn,
        OPTIMIZER,
        schedule=schedule,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
    )
    batches = batches_of(model, num_microbatches)
    state = pipe.init(case.params, batches[0], model_state=case.model_state, rng=KEY)
    losses = []
    for batch in batches:
        state, metrics = pipe.step(state, batch)
        losses.append(metrics["loss"])
    params, expected_losses, model_state = expected(model, num_microbatches)
    bounds = {"atol": 1e-10, "rtol": 1e-9} if model == DOUBLE else {"atol": 5e-6, "rtol": 1e-5}
    chex.assert_trees_all_close(pipe.params(state), params, **bounds)
    chex.assert_trees_all_close(losses, expected_losses, **bounds | {"atol": bounds["atol"] / 5})
    chex.assert_trees_all_close(pipe.model_state(state), model_state, **bounds)
    assert [memory.peak_in_flight for memory in pipe.memory(state)] == [
        _peak(pipe.schedule, stage) for stage in range(num_stages)
    ]


def _peak(schedule: pdjax.Schedule, stage: int) -> int:
    """The microbatches in flight at the peak: the published figure where there is one."""
    published = {
        "model_parallel": 1,
        "gpipe": schedule.num_microbatches,
        "one_f_one_b": min(schedule.num_stages - stage, schedule.num_microbatches),
    }
    if schedule.name in published:
        return published[schedule.name]
    return peak_in_flight(schedule.workers[schedule.worker_of(stage)], stage)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_equals_the_whole_minibatch_where_examples_are_independent(num_stages):
    """Without BatchNorm and dropout, microbatches are no more than a way to compute jax.grad."""
    case = case_of("mlp")
    batch = case.make_batch(12, 0)
    pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(1.0), num_stages=num_stages, num_microbatches=3)
    state, metrics = pipe.step(pipe.init(case.params, batch), batch)
    loss, grads = jax.value_and_grad(case.loss_fn)(case.params, batch, KEY)
    stepped = jax.tree.map(jnp.subtract, case.params, grads)
    chex.assert_trees_all_close(pipe.params(state), stepped, atol=2e-6)
    chex.assert_trees_all_close(metrics["loss"], loss, atol=1e-6)


@pytest.mark.parametrize("schedule", SYNCHRONOUS)
def test_adam(schedule):
    case = zoo.dense_blocks()
    optimizer = optax.adam(1e-2)
    batches = [case.make_batch(8, seed) for seed in range(4)]
    pipe = pdjax.Pipeline(
        case.loss_fn,
        optimizer,
        schedule=schedule,
        num_stages=3 * CHUNKS[schedule],
        num_microbatches=4,
    )
    state = pipe.init(case.params, batches[0], rng=KEY)
    for batch in batches:
        state, _ = pipe.step(state, batch)
    params, _, _ = oracle.replay_synchronous(case.loss_fn, optimizer, case.params, batches, 4, KEY)
    chex.assert_trees_all_close(pipe.params(state), params, atol=2e-6)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_dropout_masks_do_not_depend_on_stages_or_recomputation(num_stages, remat):
    case = zoo.dense_blocks(dropout=0.3)
    batches = [case.make_batch(6, seed) for seed in range(3)]
    pipe = pdjax.Pipeline(
        case.loss_fn, optax.sgd(0.1), num_stages=num_stages, num_microbatches=3, remat=remat
    )
    state = pipe.init(case.params, batches[0], rng=KEY)
    for batch in batches:
        state, _ = pipe.step(state, batch)
    params, _, _ = oracle.replay_synchronous(
        case.loss_fn, optax.sgd(0.1), case.params, batches, 3, KEY
    )
    chex.assert_trees_all_close(pipe.params(state), params, atol=2e-6, rtol=2e-5)
