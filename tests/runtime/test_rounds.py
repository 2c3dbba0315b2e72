"""Stages with replicas make one update for several minibatches: when, and at which rate."""

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
from pdjax.schedules.weight_rule import STASH
from pdjax.simulate import StageCost, steady_s
from pdjax.split.traced_update import schedule_counts

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


@pytest.mark.parametrize(
    ("replicas", "lag", "slack"),
    [((2, 1), 1, 0), ((1, 2), 1, 1), ((2, 2), 1, 0), ((3,), 1, 0), ((1, 2, 1), 2, 0)],
    ids=str,
)
def test_late_updates(replicas, lag, slack):
    """They are as stale as with a longer warm-up, and no forward pass waits for their round."""
    schedule = schedules.pipedream(len(replicas), replicas=replicas, slack=slack, update_lag=lag)
    batches = [case().make_batch(2, seed) for seed in range(13)]
    pipe = pdjax.Pipeline(case().loss_fn, OPTIMIZERS["constant"], schedule=schedule)
    state = pipe.init(case().params, batches[0], rng=KEY)
    for index, batch in enumerate(batches):
        state = pipe.drain(state) if index in (5, 7) else state
        state, _ = pipe.step(state, batch)
    ahead = zip(schedules.warm_ups(replicas, slack), replicas, strict=True)
    params, _, _ = oracle.replay_asynchronous(
        case().loss_fn,
        OPTIMIZERS["constant"],
        case().params,
        batches,
        pipe.stage_of_parameters(),
        len(replicas),
        KEY,
        (5, 7),
        replicas=replicas,
        warm_ups=[warm_up + lag * (count > 1) for warm_up, count in ahead],
    )
    state = pipe.drain(state)
    chex.assert_trees_all_close(pipe.params(state), params, atol=1e-11, rtol=1e-10)
    assert not any(held.in_flight.gradients for held in state.run.stages)


def test_a_late_update_hides_the_all_reduce():
    """Two replicas, 3 s for both passes, 3 s for an all-reduce: a round takes 6 or 3 s."""
    cost = StageCost(forward_s=1.0, backward_s=2.0, gradient_bytes=300)
    found = [
        steady_s(
            schedules.pipedream(1, replicas=(2,), update_lag=lag),
            [cost],
            pdjax.Topology.parse("2@100B/s"),
        )
        for lag in (0, 1)
    ]
    assert found == pytest.approx([3.0, 1.5])


def test_only_counters_of_schedules_are_found():
    state: Any = optax.chain(optax.adam(falling), optax.trace(0.9)).init({"w": 1.0})
    assert len(jax.tree.leaves(state)) == 5  # the moments' counter, the moments, the schedule's
    (found,) = schedule_counts(state)
    assert found is state[0][1].count
    assert schedule_counts(optax.adam(1e-3).init({"w": 1.0})) == []
