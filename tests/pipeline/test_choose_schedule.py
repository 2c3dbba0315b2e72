"""``schedule="auto"``: what is simulated, what is chosen, and that it runs."""

from __future__ import annotations

import logging

import jax
import optax
import pytest
import zoo

import pdjax
from pdjax.profile.profile import LayerProfile, Profile
from pdjax.schedules import ALGORITHMS

SYNCHRONOUS = {name for name, algorithm in ALGORITHMS.items() if not algorithm.stale}
KEY = jax.random.key(0)
BATCH = 8


def profile_of(case: zoo.Case, microbatch_size: int, stash_bytes: float = 0.0) -> Profile:
    """Figures as a measurement would have them, but the same on every machine."""
    names = names_of_layers(case, microbatch_size)
    layers = tuple(LayerProfile(name, 1e-3, 2e-3, 0.0, 0.0, stash_bytes) for name in names)
    return Profile(layers, batch_size=microbatch_size)


def names_of_layers(case: zoo.Case, microbatch_size: int) -> tuple[str, ...]:
    return zoo.graph_of(case, microbatch_size, KEY).names


def slow_first(case: zoo.Case, microbatch_size: int) -> Profile:
    """The first layer takes longest, the others have weights that take long to synchronise."""
    first, *others = names_of_layers(case, microbatch_size)
    layers = (
        LayerProfile(first, 6e-3, 12e-3, 4.0, 8.0),
        *(LayerProfile(name, 1e-4, 2e-4, 1e6, 8e7) for name in others),
    )
    return Profile(layers, batch_size=microbatch_size)


def make(case: zoo.Case | None = None, *, stash_bytes: float = 0.0, **options):
    case = case or zoo.dense_blocks(num_blocks=8)
    count = options.setdefault("num_microbatches", 4)
    options.setdefault("topology", "2@1GB/s")
    options.setdefault("devices", jax.devices()[:2])
    options.setdefault("optimizer", optax.sgd(0.1))
    options.setdefault("profile", profile_of(case, BATCH // count, stash_bytes))
    pipe = pdjax.Pipeline(case.loss_fn, schedule="auto", **options)
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
    pipe, state, batch = make(allow_stale=True, devices=jax.devices()[:4], topology="4@1GB/s")
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


def test_what_is_averaged_over_a_minibatch_needs_one_that_is_done():
    """2BW begins the next minibatch before; PipeDream's minibatches are not divided."""
    four = {"devices": jax.devices()[:4], "topology": "4@1GB/s"}
    pipe, state, batch = make(allow_stale=True, state_update="minibatch", **four)
    assert names_of(pipe) == set(ALGORITHMS) - {"pipedream_2bw"}
    pipe.step(state, batch)
    assert pipe.schedule.name == "pipedream"


# ---------------------------------------------------------------- replicas


@pytest.mark.filterwarnings("ignore:the profile is for microbatches")  # those of PipeDream
@pytest.mark.parametrize(
    ("allow_stale", "num_stages", "compared", "chosen"),
    [
        (False, None, SYNCHRONOUS, "one_f_one_b"),
        (True, None, set(ALGORITHMS), "pipedream"),
        (False, 2, {"one_f_one_b"}, "one_f_one_b"),
        (True, 2, {"one_f_one_b", "pipedream"}, "pipedream"),
    ],
)
def test_the_plan_may_have_replicas(allow_stale, num_stages, compared, chosen):
    """With the number of stages given, what has no replicas would leave workers idle."""
    case = zoo.dense_blocks(num_blocks=8)
    pipe, state, batch = make(
        case,
        plan="auto",
        replicate=True,
        profile=slow_first(case, 2),
        devices=jax.devices()[:4],
        topology="4@1GB/s",
        num_stages=num_stages,
        allow_stale=allow_stale,
    )
    assert names_of(pipe) == compared
    assert pipe.schedule.name == chosen
    assert pipe.schedule.replicas == (3, 1)
    state, _ = pipe.step(state, batch)
    pipe.drain(state)


@pytest.mark.parametrize(
    ("replicate", "cut_bytes", "param_bytes", "chosen", "replicas"),
    [
        (False, 1e9, 8.0, "model_parallel", (1,)),  # nothing is gained by a second worker
        (True, 1e9, 8.0, "one_f_one_b", (4,)),  # data parallelism
        (True, 4.0, 8e5, "zero_bubble_h1", (1,) * 4),  # that takes 34 ms, this 30 ms
    ],
)
def test_what_is_run_is_what_was_simulated(replicate, cut_bytes, param_bytes, chosen, replicas):
    case = zoo.dense_blocks(num_blocks=8)
    figures = (1e-3, 2e-3, cut_bytes, param_bytes)
    rows = (LayerProfile(name, *figures) for name in names_of_layers(case, 2))
    pipe, state, batch = make(
        case,
        plan="auto",
        replicate=replicate,
        profile=Profile(tuple(rows), batch_size=2),
        devices=jax.devices()[:4],
        topology="4@1GB/s",
    )
    assert pipe.comparison is not None
    simulated = {each.name: each.schedule for each in pipe.comparison.candidates}
    assert pipe.schedule == simulated[pipe.schedule.name]
    assert (pipe.schedule.name, pipe.schedule.replicas) == (chosen, replicas)
    pipe.step(state, batch)


def test_a_plan_with_replicas_leaves_those_that_have_them():
    case = zoo.dense_blocks(num_blocks=8)
    options = pdjax.PlanOptions("one_f_one_b", 4)
    profile = slow_first(case, 2)
    plan = pdjax.plan_pipeline(profile, pdjax.Topology.parse("4@1GB/s"), options)
    assert plan.replicas == (3, 1)
    four = {"devices": jax.devices()[:4], "topology": "4@1GB/s"}
    pipe, state, batch = make(case, plan=plan, profile=profile, **four)
    assert names_of(pipe) == {"one_f_one_b"}
    assert pipe.plan == plan
    pipe.step(state, batch)


def test_too_few_workers_for_any_schedule():
    with pytest.raises(
        ValueError, match=r"none that can run 2 stages(.|\n)*gpipe cannot run: .*has 1"
    ):
        make(plan=["block_4"], topology="1@1GB/s")


# ---------------------------------------------------------------- not given, not taken


def test_a_schedule_that_is_given_is_compared_with_nothing():
    case = zoo.dense_blocks()
    pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(0.1), num_stages=2)
    pipe.init(case.params, case.make_batch(4, 0))
    assert pipe.comparison is None


def test_chunks_are_not_given_with_it():
    with pytest.raises(ValueError, match="num_chunks=2 with schedule='auto'"):
        pdjax.Pipeline(zoo.dense_blocks().loss_fn, optax.sgd(0.1), schedule="auto", num_chunks=2)
