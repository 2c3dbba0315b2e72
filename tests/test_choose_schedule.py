"""``schedule="auto"``: what is simulated, what is chosen, and that it runs."""

from __future__ import annotations

import logging

import jax
import optax
import pytest
import zoo

import pdjax
from pdjax.profile import LayerProfile, Profile
from pdjax.schedules import ALGORITHMS

SYNCHRONOUS = {name for name, algorithm in ALGORITHMS.items() if not algorithm.stale}
KEY = jax.random.key(0)
BATCH = 8


def profile_of(case: zoo.Case, microbatch_size: int, stash_bytes: float = 0.0) -> Profile:
    """Figures as a measurement would have them, but the same on every machine."""
    names = zoo.graph_of(case, microbatch_size, KEY).names
    layers = tuple(LayerProfile(name, 1e-3, 2e-3, 0.0, 0.0, stash_bytes) for name in names)
    return Profile(layers, batch_size=microbatch_size)


def make(case: zoo.Case | None = None, *, stash_bytes: float = 0.0, **options):
    case = case or zoo.dense_blocks(num_blocks=8)
    count = options.setdefault("num_microbatches", 4)
    options.setdefault("topology", "2@1GB/s")
    options.setdefault("devices", jax.devices()[:2])
    options.setdefault("optimizer", optax.sgd(0.1))
    pipe = pdjax.Pipeline(
        case.loss_fn,
        schedule="auto",
        profile=profile_of(case, BATCH // count, stash_bytes),
        **options,
    )
    batch = case.make_batch(BATCH, 0)
    return pipe, pipe.init(case.params, batch, rng=KEY), batch


def names_of(pipe: pdjax.Pipeline) -> set[str]:
    assert pipe.comparison is not None
    return {outcome.name for outcome in pipe.comparison.outcomes}


@pytest.mark.parametrize("plan", ["auto", "balanced"])
def test_the_fastest_synchronous_schedule_is_chosen_and_run(plan, caplog):
    caplog.set_level(logging.INFO, logger="pdjax")
    pipe, state, batch = make(plan=plan)
    assert pipe.comparison is not None
    assert names_of(pipe) == SYNCHRONOUS
    fastest = min(outcome.minibatch_s for outcome in pipe.comparison.outcomes)
    chosen = next(o for o in pipe.comparison.outcomes if o.name == pipe.schedule.name)
    assert chosen.minibatch_s <= 1.01 * fastest
    assert pipe.schedule.name == "zero_bubble_v"
    assert pipe.schedule.num_microbatches == 4
    assert str(pipe.comparison) in caplog.text
    before = pipe.evaluate(state, batch)["loss"]
    for _ in range(3):
        state, _ = pipe.step(state, batch)
    assert pipe.evaluate(state, batch)["loss"] < before


def test_asynchronous_ones_only_if_stale_weights_are_allowed():
    pipe, state, batch = make(allow_stale=True, devices=jax.devices(), topology="4@1GB/s")
    assert names_of(pipe) == set(ALGORITHMS)
    assert pipe.schedule.name == "pipedream_2bw"  # as fast as the others, and least stale
    state, _ = pipe.step(state, batch)
    pipe.drain(state)


def test_a_minibatch_that_is_not_divided_is_traced_as_a_whole():
    """One microbatch: then PipeDream is what never waits, and 2BW would need two."""
    pipe, state, batch = make(allow_stale=True, num_microbatches=1)
    assert "pipedream_2bw" not in names_of(pipe)
    assert pipe.schedule.name == "pipedream"
    pipe.step(state, batch)


def test_memory_decides():
    """GPipe's stash does not fit, and of those that fit the fastest is taken."""
    free, _, _ = make(stash_bytes=2.0**20)
    assert free.comparison is not None
    peaks = {outcome.name: outcome.peak_bytes for outcome in free.comparison.outcomes}
    limit = (peaks["one_f_one_b"] + peaks["gpipe"]) // 2
    pipe, _, _ = make(stash_bytes=2.0**20, topology=f"2@1GB/s:{limit}B", num_stages=2)
    assert pipe.comparison is not None
    fits = {outcome.name: outcome.fits for outcome in pipe.comparison.outcomes}
    assert not fits["gpipe"]
    assert fits[pipe.schedule.name]


def test_cuts_by_hand_leave_one_stage_to_a_device():
    pipe, _, _ = make(plan=["block_4"])
    assert names_of(pipe) == {name for name in SYNCHRONOUS if ALGORITHMS[name].num_chunks == 1}
    assert pipe.plan.first_layers == (0, 4)


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [
        (zoo.dense_blocks(num_blocks=8, tied=True), optax.sgd(0.1)),
        (zoo.dense_blocks(num_blocks=8), optax.chain(optax.clip_by_global_norm(1), optax.sgd(0.1))),
    ],
)
def test_what_stale_weights_cannot_do_exactly_keeps_to_synchronous_schedules(case, optimizer):
    pipe, state, batch = make(case, allow_stale=True, optimizer=optimizer, plan=["block_4"])
    assert names_of(pipe) <= SYNCHRONOUS
    pipe.step(state, batch)


def test_a_schedule_that_is_given_is_compared_with_nothing():
    case = zoo.dense_blocks()
    pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(0.1), num_stages=2)
    pipe.init(case.params, case.make_batch(4, 0))
    assert pipe.comparison is None


def test_chunks_are_not_given_with_it():
    with pytest.raises(ValueError, match="num_chunks=2 with schedule='auto'"):
        pdjax.Pipeline(zoo.dense_blocks().loss_fn, optax.sgd(0.1), schedule="auto", num_chunks=2)
