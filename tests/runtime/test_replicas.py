"""Replicated stages compute what one device computes, round by round."""

from __future__ import annotations

import functools
import random
import time
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import zoo

import pdjax
from pdjax import schedules
from pdjax.communication.transport import LocalTransport
from pdjax.profile.profile import LayerProfile
from pdjax.simulate import peak_bytes

KEY = jax.random.key(5)
OPTIMIZER = optax.adam(1e-2, eps=1e-3)


def replications(num_workers: int) -> list[tuple[int, ...]]:
    """All ways to share out workers among stages."""
    return [
        (first, *rest)
        for first in range(1, num_workers + 1)
        for rest in (replications(num_workers - first) if first < num_workers else [()])
    ]


PATTERNS = [p for count in range(2, 5) for p in replications(count) if max(p) > 1]
FIVE = [p for p in replications(5) if max(p) > 1]


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@functools.cache
def case() -> zoo.Case:
    return zoo.dense_blocks(num_blocks=4, dropout=0.2).double()


class SlowTransport(LocalTransport):
    """Waits now and then, as a slow link does."""

    def __init__(self, num_places: int) -> None:
        super().__init__(num_places)
        self._chance = random.Random(0)

    def move(self, values, shapes, source, target):
        if self._chance.random() < 0.3:
            jax.block_until_ready(values)
            time.sleep(self._chance.random() / 200)
        return super().move(values, shapes, source, target)


def train(schedule, batches, drains=(), *, slow=False, **options):
    """Trains, with drains before some minibatches and at the end."""
    pipe = pdjax.Pipeline(case().loss_fn, OPTIMIZER, schedule=schedule, **options)
    state = pipe.init(case().params, batches[0], rng=KEY)
    if slow:
        state.executor._transport = SlowTransport(sum(schedule.replicas))
    losses = []
    for index, batch in enumerate(batches):
        if index in drains:
            state = pipe.drain(state)
        state, metrics = pipe.step(state, batch)
        losses.append(metrics["loss"])
    return pipe, pipe.drain(state), losses


@pytest.mark.parametrize(
    ("replicas", "slack"), [*((p, 0) for p in PATTERNS), ((2, 1), 1), ((1, 2, 1), 1), ((1, 3), 1)]
)
def test_pipedream_equals_the_oracle_with_rounds(replicas, slack):
    """13 minibatches with drains before 5 and 7: numbers that divide nothing."""
    compare_with_rounds(replicas, slack, 13, (5, 7))


@pytest.mark.parametrize("replicas", FIVE, ids=str)
def test_five_workers(replicas):
    compare_with_rounds(replicas, 0, 8, (5,))


def compare_with_rounds(replicas, slack, num_minibatches, drains):
    """Trains over links that are slow now and then."""
    schedule = schedules.pipedream(len(replicas), replicas=replicas, slack=slack)
    batches = [case().make_batch(2, seed) for seed in range(num_minibatches)]
    pipe, state, losses = train(schedule, batches, drains, slow=True)
    params, expected, _ = oracle.replay_asynchronous(
        case().loss_fn,
        OPTIMIZER,
        case().params,
        batches,
        pipe.stage_of_parameters(),
        len(replicas),
        KEY,
        drains,
        replicas=replicas,
        warm_ups=schedules.warm_ups(replicas, slack),
    )
    chex.assert_trees_all_close(losses, expected, rtol=1e-10)
    chex.assert_trees_all_close(pipe.params(state), params, atol=1e-11, rtol=1e-10)
    for held in state.run.stages:
        assert not held.stash
        assert not held.inbox
        assert not held.returned


@pytest.mark.parametrize(
    ("replicas", "num_microbatches"), [*((p, 3) for p in PATTERNS), ((3, 1), 1), ((2, 2), 4)]
)
def test_synchronous_schedules_equal_one_device(replicas, num_microbatches):
    schedule = schedules.one_f_one_b(len(replicas), num_microbatches, replicas=replicas)
    batches = [case().make_batch(2 * num_microbatches, seed) for seed in range(3)]
    pipe, state, losses = train(schedule, batches)
    params, expected, _ = oracle.replay_synchronous(
        case().loss_fn, OPTIMIZER, case().params, batches, num_microbatches, KEY
    )
    chex.assert_trees_all_close(losses, expected, rtol=1e-10)
    chex.assert_trees_all_close(pipe.params(state), params, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("replicas", [(2, 1), (1, 3), (2, 2), (3, 1), (4,)], ids=str)
def test_replicas_hold_the_same_weights(replicas):
    schedule = schedules.pipedream(len(replicas), replicas=replicas)
    batches = [case().make_batch(2, seed) for seed in range(7)]
    _, state, _ = train(schedule, batches)
    at = 0
    for count in replicas:
        first, *others = state.run.stages[at : at + count]
        for other in others:
            chex.assert_trees_all_equal(
                jax.device_get(first.weights), jax.device_get(other.weights)
            )
            assert other.version == first.version
        at += count


def test_each_replica_is_on_its_device_and_does_its_share():
    schedule = schedules.one_f_one_b(2, 6, replicas=(3, 1))
    pipe, state, _ = train(schedule, [case().make_batch(12, 0)])
    where = [next(iter(held.weights[0].devices())).id for held in state.run.stages]
    assert where == [0, 1, 2, 3]
    done = [dict(held.performed) for held in state.run.stages]
    assert done[:3] == [{"F": 2, "B": 2, "U": 1}] * 3
    assert done[3] == {"FB": 6, "U": 1}
    assert pipe.counts(state).actions == ({"B": 6, "F": 6, "U": 3}, {"B": 6, "F": 6, "U": 1})


def test_executed_order_is_planned_order():
    schedule = schedules.pipedream(2, replicas=(3, 1))
    pipe = pdjax.Pipeline(case().loss_fn, OPTIMIZER, schedule=schedule)
    batch = case().make_batch(2, 0)
    state = pipe.init(case().params, batch)
    seen: list[list[str]] = [[] for _ in schedule.workers]

    def observe(kind, place, microbatch, made):
        del made
        places = state_executor.places
        worker, stage = places.worker_of[place], places.stage_of[place]
        seen[worker] += [f"{stage}{letter}{microbatch}" for letter in kind]

    state_executor = state.executor
    state_executor.observer = observe
    for _ in range(8):
        state, _ = pipe.step(state, batch)
    pipe.drain(state)
    assert seen == [[str(action) for action in row] for row in schedule.unroll(8)]


@pytest.mark.parametrize(
    ("name", "replicas"),
    [
        ("pipedream", (2, 1)),
        ("pipedream", (1, 3)),
        ("pipedream", (1, 2, 1)),
        ("one_f_one_b", (2, 1)),
        ("one_f_one_b", (2, 2)),
        ("one_f_one_b", (4,)),
    ],
)
def test_what_is_sent_and_held_is_what_is_simulated(name, replicas):
    count = 1 if name == "pipedream" else 5
    schedule = getattr(schedules, name)(len(replicas), count, replicas=replicas)
    steps = 9
    batches = [case().make_batch(2 * count, seed) for seed in range(steps)]
    pipe, state, _ = train(schedule, batches)
    layers = tuple(LayerProfile(layer, 1.0, 2.0, 0.0, 0.0) for layer in pipe.plan.layers)
    timeline = pipe.simulate(pdjax.Profile(layers), num_minibatches=steps)
    counts = pipe.counts(state)
    assert counts.link_bytes == timeline.link_bytes
    costs = state.training.prepared.stage_costs(pdjax.Profile(layers))
    rule = pdjax.STASH if name == "pipedream" else pdjax.LATEST
    assert counts.peak_bytes == peak_bytes(schedule, costs, rule)


@pytest.mark.parametrize("replicas", [(2, 1), (1, 3), (3, 1), (2, 2)], ids=str)
def test_delays_change_nothing(replicas):
    schedule = schedules.pipedream(len(replicas), replicas=replicas)
    batches = [case().make_batch(2, seed) for seed in range(9)]
    quiet, slow = (train(schedule, batches, slow=slow) for slow in (False, True))
    chex.assert_trees_all_equal(quiet[0].params(quiet[1]), slow[0].params(slow[1]))


def test_a_loss_with_weights():
    """The weights of all minibatches of a round count, whichever replica had them."""

    def loss_fn(params, batch):
        error = (jnp.tanh(batch["x"] @ params["a"]) @ params["b"])[:, 0] ** 2
        return jnp.sum(error * batch["mask"]), batch["mask"].sum()

    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(3, 3)) for name in "ab"}
    batch = {"x": rng.normal(size=(8, 3)), "mask": jnp.array([1.0, 0, 1, 1, 0, 0, 1, 1])}
    pipe = pdjax.Pipeline(
        loss_fn,
        optax.sgd(1.0),
        schedule=schedules.one_f_one_b(2, 4, replicas=(2, 1)),
        weighted_loss=True,
    )
    state, metrics = pipe.step(pipe.init(params, batch), batch)

    def mean(params):
        total, weight = loss_fn(params, batch)
        return total / weight

    loss, gradient = jax.value_and_grad(mean)(params)
    chex.assert_trees_all_close(metrics["loss"], loss, rtol=1e-10)
    expected = jax.tree.map(jnp.subtract, params, gradient)
    chex.assert_trees_all_close(pipe.params(state), expected, rtol=1e-10)


def test_clipping_by_the_global_norm_over_replicated_stages():
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    batch = case().make_batch(6, 0)
    pipe = pdjax.Pipeline(
        case().loss_fn, optimizer, schedule=schedules.one_f_one_b(2, 3, replicas=(2, 2))
    )
    state = pipe.init(case().params, batch, rng=KEY)
    state, _ = pipe.step(state, batch)
    params, _, _ = oracle.replay_synchronous(
        case().loss_fn, optimizer, case().params, [batch], 3, KEY
    )
    chex.assert_trees_all_close(pipe.params(state), params, rtol=1e-10)


def test_moving_averages_are_averaged_over_replicas():
    def loss_fn(params, state, batch):
        mean = 0.9 * state["mean"] + 0.1 * batch["x"].mean(0)
        loss = jnp.mean((batch["x"] @ params["w"]) ** 2)
        return loss, {"mean": mean, "count": state["count"] + 1}

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 2))}
    model_state = {"mean": jnp.zeros(3), "count": jnp.zeros((), jnp.int32)}
    batch = {"x": rng.normal(size=(4, 3))}
    pipe = pdjax.Pipeline(
        loss_fn, optax.sgd(0.1), schedule=schedules.one_f_one_b(1, 2, replicas=(2,))
    )
    state = pipe.init(params, batch, model_state=model_state)
    state, _ = pipe.step(state, batch)
    found = pipe.model_state(state)
    chex.assert_trees_all_close(found["mean"], 0.1 * batch["x"].mean(0), rtol=1e-10)
    assert int(found["count"]) == 1


@pytest.mark.parametrize("name", ["one_f_one_b", "pipedream"])
def test_init_compiles_all_that_steps_and_drains_run(name, compilations):
    """Sums of scalars, means of mutable state and broken off rounds included.

    All but what divides the batch on the three workers that read it, and the mean of the losses.
    """

    def loss_fn(params, state, batch):
        hidden = jnp.tanh(params["scale"] * (batch["x"] @ params["a"]))
        loss = jnp.mean((hidden @ params["b"]) ** 2)
        return loss, {"mean": 0.9 * state["mean"] + 0.1 * hidden.mean()}

    schedule = getattr(schedules, name)(2, 4 if name == "one_f_one_b" else 1, replicas=(3, 1))
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 3)), "b": rng.normal(size=(3, 3)), "scale": np.float64(1)}
    batch = {"x": rng.normal(size=(4, 3))}
    pipe = pdjax.Pipeline(loss_fn, OPTIMIZER, schedule=schedule)
    state = pipe.init(params, batch, model_state={"mean": np.float64(0)})
    compilations.clear()
    for _ in range(4):  # the second round of PipeDream is broken off
        state, _ = pipe.step(state, batch)
    pipe.drain(state)
    assert len(compilations) == (3 + 1 if name == "one_f_one_b" else 3)


def replicated_plan() -> pdjax.Plan:
    """The first half takes twice as long, the second has weights that take long to synchronise."""
    rows = [(2e-3, 4e-3, 4.0, 8.0)] * 2 + [(1e-3, 2e-3, 4.0, 8e7)] * 2
    layers = tuple(LayerProfile(f"block_{at}", *row) for at, row in enumerate(rows))
    options = pdjax.PlanOptions(together=((0, 1), (2, 3)))
    topology = pdjax.Topology.parse("3@1GB/s")
    return pdjax.plan_pipeline(pdjax.Profile(layers, batch_size=2), topology, options)


@pytest.mark.parametrize("schedule", ["one_f_one_b", "pipedream"])
def test_a_plan_with_replicas_is_run(schedule):
    plan = replace(replicated_plan(), prediction=None)  # it was made for PipeDream
    assert plan.replicas == (2, 1)
    count = 4 if schedule == "one_f_one_b" else 1
    pipe = pdjax.Pipeline(
        case().loss_fn, OPTIMIZER, schedule=schedule, plan=plan, num_microbatches=count
    )
    batch = case().make_batch(2 * count, 0)
    state = pipe.init(case().params, batch, rng=KEY)
    state, _ = pipe.step(state, batch)
    pipe.drain(state)
    assert pipe.schedule.replicas == (2, 1)


@pytest.mark.parametrize(
    ("replicate", "schedule", "num_stages", "replicas"),
    [
        (True, "one_f_one_b", None, (4,)),
        (True, "one_f_one_b", 1, (4,)),
        (False, "one_f_one_b", None, (1,)),
        (False, "one_f_one_b", 1, (1,)),
        (None, "one_f_one_b", None, (1,)),
        (True, "gpipe", None, (1,)),
        (True, "pipedream_vertical_sync", None, (1,)),
    ],
)
def test_the_planner_replicates_if_it_and_the_schedule_may(
    replicate, schedule, num_stages, replicas
):
    names = ("block_0", "block_1", "block_2", "block_3")
    count = 1 if schedule == "pipedream_vertical_sync" else 4
    profile = pdjax.Profile(
        tuple(LayerProfile(name, 1e-3, 2e-3, 1e6, 8.0) for name in names), batch_size=2
    )
    pipe = pdjax.Pipeline(
        case().loss_fn,
        OPTIMIZER,
        schedule=schedule,
        plan="auto",
        replicate=replicate,
        num_stages=num_stages,
        profile=profile,
        topology="4@1MB/s",
        num_microbatches=count,
    )
    batch = case().make_batch(2 * count, 0)
    state = pipe.init(case().params, batch, rng=KEY)
    pipe.step(state, batch)
    assert pipe.schedule.replicas == replicas


def test_several_processes_may_replicate_unless_told_otherwise():
    pipe = pdjax.Pipeline(case().loss_fn, OPTIMIZER)
    for given, in_one, in_several in ((None, False, True), (True,) * 3, (False,) * 3):
        settings = replace(pipe._settings, replicate=given)
        assert settings.for_processes(several=False).replicate is in_one
        assert settings.for_processes(several=True).replicate is in_several


@pytest.mark.parametrize("schedule", ["gpipe", "zero_bubble_h1", "pipedream_vertical_sync"])
def test_schedules_without_replicas(schedule):
    plan = replace(replicated_plan(), prediction=None)
    pipe = pdjax.Pipeline(case().loss_fn, OPTIMIZER, schedule=schedule, plan=plan)
    with pytest.raises(ValueError, match=r"one worker for each stage\. Use one of one_f_one_b"):
        pipe.init(case().params, case().make_batch(4, 0))
