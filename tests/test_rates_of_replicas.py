"""Learning rates of stages with replicas, which make one update for several minibatches."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import chex
import jax
import optax
import oracle
import pytest
import zoo

import pdjax
from pdjax import schedules
from pdjax.optimizer import schedule_counts
from pdjax.weights import STASH

KEY = jax.random.key(5)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@functools.cache
def case() -> zoo.Case:
    return zoo.dense_blocks(num_blocks=4, dropout=0.2).double()


def falling(step):
    """So steep that one minibatch more or less is seen."""
    return 1e-2 * 0.8**step


OPTIMIZERS = {
    "adam": optax.adam(falling, eps=1e-3),
    "injected": optax.inject_hyperparams(optax.sgd)(falling),
    "constant": optax.adam(1e-2, eps=1e-3),
}


@pytest.mark.parametrize("rate", ["same", "scaled"])
@pytest.mark.parametrize(
    ("optimizer", "replicas"),
    [
        ("adam", (2, 1)),
        ("adam", (1, 3)),
        ("adam", (4,)),
        ("injected", (3, 1)),
        ("constant", (1, 2, 1)),
    ],
    ids=str,
)
def test_schedules_count_minibatches_and_rates_are_as_chosen(optimizer, replicas, rate):
    """13 minibatches, drains before 5 and 7: rounds are broken off."""
    schedule = schedules.pipedream(len(replicas), replicas=replicas)
    batches = [case().make_batch(2, seed) for seed in range(13)]
    chosen = OPTIMIZERS[optimizer]
    rule = replace(STASH, replica_learning_rate=rate)
    pipe = pdjax.Pipeline(case().loss_fn, chosen, schedule=schedule, weight_rule=rule)
    state = pipe.init(case().params, batches[0], rng=KEY)
    for index, batch in enumerate(batches):
        state = pipe.drain(state) if index in (5, 7) else state
        state, _ = pipe.step(state, batch)
    params, _, _ = oracle.replay_asynchronous(
        case().loss_fn,
        chosen,
        case().params,
        batches,
        pipe.stage_of_parameters(),
        len(replicas),
        KEY,
        (5, 7),
        replicas=replicas,
        warm_ups=schedules.warm_ups(replicas),
        scaled=rate == "scaled",
    )
    chex.assert_trees_all_close(pipe.params(pipe.drain(state)), params, atol=1e-11, rtol=1e-10)


def test_only_counters_of_schedules_are_found():
    state: Any = optax.chain(optax.adam(falling), optax.trace(0.9)).init({"w": 1.0})
    assert len(jax.tree.leaves(state)) == 5  # the moments' counter, the moments, the schedule's
    (found,) = schedule_counts(state)
    assert found is state[0][1].count
    assert schedule_counts(optax.adam(1e-3).init({"w": 1.0})) == []
