"""Under asynchronous schedules a pipeline computes what the replay oracle does, to the last update.

In float64: over a dozen updates training multiplies the rounding of the first one by hundreds, so
that in float32 only bounds would hold that a small error of the pipeline could pass too.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import optax
import oracle
import pytest
import zoo

import pdjax
from pdjax.schedules import ALGORITHMS

KEY = jax.random.key(3)
STEPS = 13
OPTIMIZERS = {
    "adam": optax.adam(1e-2, eps=1e-3),
    "momentum": optax.sgd(0.05, momentum=0.9),
}
CASES: dict[str, Any] = {
    **{name: functools.partial(make, dtype="float64") for name, make in zoo.MODELS.items()},
    "dropout": lambda: zoo.dense_blocks(dropout=0.2),
    "skip": lambda: zoo.dense_blocks(l2=0.01),
}


@functools.cache
def case_of(name: str) -> zoo.Case:
    return CASES[name]().double()


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


SMALL = ("mlp", "dropout", "skip")
RUNS = [(optimizer, drains) for optimizer in OPTIMIZERS for drains in ((), (5, 7))]


@pytest.mark.grid(2)
@pytest.mark.parametrize(
    ("name", "optimizer", "drains"),
    [(name, *run) for name in CASES for run in (RUNS if name in SMALL else (RUNS[0], RUNS[3]))],
)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_pipedream_equals_the_replay_oracle(name, num_stages, optimizer, drains):
    pipe, state = check_against_the_oracle(name, "pipedream", num_stages, 1, optimizer, drains)
    for stage, memory in enumerate(pipe.memory(state)):
        warm_up = num_stages - 1 - stage
        assert memory.peak_in_flight == warm_up + 1
        assert memory.peak_versions <= warm_up + 1
        if not drains:
            assert memory.peak_versions == warm_up + 1


@pytest.mark.parametrize(
    ("name", "num_stages", "optimizer", "drains"),
    [
        *(("mlp", n, "adam", ()) for n in (1, 2, 3, 4)),
        *(("dropout", n, "momentum", (5, 7)) for n in (2, 3, 4)),
        ("transformer", 3, "adam", (4, 8)),
        ("vgg16_bn", 3, "momentum", (5, 7)),
    ],
)
def test_vertical_sync_equals_the_replay_oracle(name, num_stages, optimizer, drains):
    schedule = "pipedream_vertical_sync"
    pipe, state = check_against_the_oracle(name, schedule, num_stages, 1, optimizer, drains)
    if not drains:
        assert {memory.peak_versions for memory in pipe.memory(state)} == {num_stages}


@pytest.mark.parametrize(
    ("name", "num_stages", "num_microbatches", "optimizer", "drains"),
    [
        *(("mlp", n, m, "adam", ()) for n, m in ((1, 1), (1, 3), (2, 2), (2, 3), (3, 5), (4, 4))),
        *(("dropout", n, m, "momentum", (5, 7)) for n, m in ((1, 2), (2, 3), (4, 5))),
        ("transformer", 2, 3, "adam", (4, 8)),
        ("vgg16_bn", 3, 3, "momentum", (5, 7)),
    ],
)
def test_2bw_equals_the_replay_oracle(name, num_stages, num_microbatches, optimizer, drains):
    pipe, state = check_against_the_oracle(
        name, "pipedream_2bw", num_stages, num_microbatches, optimizer, drains
    )
    for stage, memory in enumerate(pipe.memory(state)):
        assert memory.peak_in_flight == num_stages - stage
        assert memory.peak_versions == 2


def check_against_the_oracle(name, schedule, num_stages, num_microbatches, optimizer, drains):
    """Trains with some drains, and compares with the oracle."""
    with zoo.compiled_quickly(name in zoo.LARGE):
        return compare_with_the_oracle(
            name, schedule, num_stages, num_microbatches, optimizer, drains
        )


def compare_with_the_oracle(name, schedule, num_stages, num_microbatches, optimizer, drains):
    case = case_of(name)
    size = zoo.MICROBATCH * num_microbatches
    batches = [case.make_batch(size, seed) for seed in range(STEPS)]
    pipe = pdjax.Pipeline(
        case.loss_fn,
        OPTIMIZERS[optimizer],
        schedule=schedule,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
    )
    state = pipe.init(case.params, batches[0], model_state=case.model_state, rng=KEY)
    losses = []
    for index, batch in enumerate(batches):
        if index in drains:
            state = pipe.drain(state)
        state, metrics = pipe.step(state, batch)
        losses.append(metrics["loss"])
    state = pipe.drain(state)
    params, expected_losses, model_state = oracle.replay_asynchronous(
        case.loss_fn,
        OPTIMIZERS[optimizer],
        case.params,
        batches,
        pipe.stage_of_parameters(),
        num_stages,
        KEY,
        drains,
        case.model_state,
        rule=ALGORITHMS[schedule].weight_rule.name,
        num_microbatches=num_microbatches,
    )
    chex.assert_trees_all_close(losses, expected_losses, rtol=1e-10)
    chex.assert_trees_all_close(pipe.params(state), params, atol=1e-11, rtol=1e-10)
    chex.assert_trees_all_close(pipe.model_state(state), model_state, atol=1e-11, rtol=1e-10)
    return pipe, state


def test_a_drain_leaves_nothing_behind():
    case = case_of("mlp")
    pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(0.1), schedule="pipedream", num_stages=4)
    batch = case.make_batch(zoo.MICROBATCH, 0)
    state = pipe.init(case.params, batch)
    for _ in range(6):
        state, _ = pipe.step(state, batch)
    before = [len(held.in_flight.stash) for held in state.run.stages]
    state = pipe.drain(state)
    assert before == [3, 2, 1, 0]
    for held in state.run.stages:
        assert not held.in_flight.stash
        assert not held.in_flight.activations
        assert not held.in_flight.cotangents
        assert held.lasting.version == 6


def test_weights_are_stale_by_the_published_amount():
    """With one weight per stage and a loss linear in each, the versions can be read off."""
    case = zoo.dense_blocks(num_blocks=3)
    pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(0.1), schedule="pipedream", num_stages=3)
    batch = case.make_batch(2, 0)
    state = pipe.init(case.params, batch)
    for _ in range(8):
        state, _ = pipe.step(state, batch)
    assert [held.lasting.version for held in state.run.stages] == [6, 7, 8]
    assert [sorted(held.in_flight.stash) for held in state.run.stages] == [[6, 7], [7], []]
