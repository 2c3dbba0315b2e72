"""What a `Pipeline` can be told about its schedule, and evaluation in microbatches."""

from __future__ import annotations

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
from pdjax.profile.profile import LayerProfile
from pdjax.schedules.weight_rule import DOUBLE_BUFFER

KEY = jax.random.key(0)
CASE = zoo.dense_blocks(num_blocks=8)


def make(**options):
    return pdjax.Pipeline(CASE.loss_fn, optax.sgd(0.1), **options)


def trained(pipe, steps=3, size=12):
    batches = [CASE.make_batch(size, seed) for seed in range(steps)]
    state = pipe.init(CASE.params, batches[0], rng=KEY)
    for batch in batches:
        state, _ = pipe.step(state, batch)
    params, _, _ = oracle.replay_synchronous(
        CASE.loss_fn, optax.sgd(0.1), CASE.params, batches, pipe.schedule.num_microbatches, KEY
    )
    return pipe.params(state), params


@pytest.mark.parametrize("as_path", [True, False])
def test_a_schedule_from_a_file(tmp_path, as_path):
    """Two stages on each worker, and one backward pass divided, another not."""
    path = tmp_path / "mine.txt"
    path.write_text("""
        worker 0: 0F0 0F1 1F0 1F1         1B1     1I0 0B1 1W0 0B0 0U1 1U1
        worker 1:             2F0 2F1 2B1 2I0 2W0                 2U1
    """)
    pipe = make(schedule=path if as_path else str(path))
    got, expected = trained(pipe)
    chex.assert_trees_all_close(got, expected, atol=2e-6)
    assert pipe.schedule.name == "custom"
    assert pipe.plan.num_stages == 3


def test_stages_on_workers_in_any_order():
    pipe = make(
        schedule=pdjax.Schedule.parse("""
            worker 0: 1F0 1F1 1B0 1B1 1U1
            worker 1: 2F0 2F1 2B0 2B1 2U1
            worker 2: 0F0 0F1 0B0 0B1 0U1
        """)
    )
    got, expected = trained(pipe)
    chex.assert_trees_all_close(got, expected, atol=2e-6)


@pytest.mark.parametrize("num_chunks", [1, 3, 4])
def test_any_number_of_chunks(num_chunks):
    pipe = make(schedule="interleaved", num_stages=2 * num_chunks, num_chunks=num_chunks)
    got, expected = trained(pipe)
    chex.assert_trees_all_close(got, expected, atol=2e-6)
    assert len(pipe.schedule.workers) == 2


def test_as_many_stages_as_the_devices_take():
    pipe = make(schedule="zero_bubble_v", devices=jax.devices()[:3])
    batch = CASE.make_batch(12, 0)
    state = pipe.init(CASE.params, batch)
    assert pipe.plan.num_stages == 6
    assert pipe.schedule.num_microbatches == 12  # four for each device
    where = [next(iter(held.lasting.weights[0].devices())).id for held in state.run.stages]
    assert where == [0, 1, 2, 2, 1, 0]


def slow_at_the_end(batch_size: int) -> pdjax.Profile:
    names = zoo.graph_of(CASE, 2, KEY).names
    layers = [LayerProfile(n, 1.0, 2.0, 0.0, 0.0) for n in names]
    layers[-1] = LayerProfile(names[-1], 7.0, 14.0, 0.0, 0.0)
    return pdjax.Profile(tuple(layers), batch_size=batch_size)


def with_chunks(profile: pdjax.Profile) -> pdjax.Pipeline:
    return make(
        schedule="interleaved",
        plan="auto",
        profile=profile,
        devices=jax.devices()[:1],
        num_microbatches=2,
    )


def test_chunks_are_cut_by_what_was_measured():
    """With plan="auto" the stages are equally long by the profile; the last block is slow."""
    pipe = with_chunks(slow_at_the_end(batch_size=2))
    pipe.init(CASE.params, CASE.make_batch(4, 0))
    assert pipe.plan.first_layers == (0, 7)


def test_chunks_are_cut_by_a_profile_that_is_fit_for_them():
    pipe = with_chunks(slow_at_the_end(batch_size=4))
    with pytest.warns(pdjax.PdjaxWarning, match="scaled by 2/4"):
        pipe.init(CASE.params, CASE.make_batch(4, 0))
    assert pipe.plan.first_layers == (0, 7)
    other = replace(slow_at_the_end(batch_size=2), model="0" * 16)
    with pytest.raises(ValueError, match="the profile is of another model"):
        with_chunks(other).init(CASE.params, CASE.make_batch(4, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "gpipe", "num_chunks": 2}, "runs one stage on each worker"),
        ({"schedule": "interleaved", "num_chunks": 0}, "num_chunks=0; expected at least 1"),
        ({"schedule": "zero_bubble_v", "num_chunks": 3}, "num_chunks=3; expected 2"),
        ({"schedule": schedules.gpipe(2, 2), "num_chunks": 2}, "the schedule says which stages"),
        ({"schedule": "interleaved", "num_stages": 5}, "which 5 stages do not divide into"),
        ({"schedule": "interleaved", "num_stages": 12}, "12 stages, 2 on each device, need 6"),
        ({"schedule": "none.txt"}, "'none.txt' cannot be read"),
        ({"schedule": 3}, "expected a name such as 'one_f_one_b', the path of a .txt file"),
        ({"schedule": "zero_buble_v"}, "Did you mean 'zero_bubble_v'"),
    ],
)
def test_schedules_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": "pipedream", "num_stages": 3, "weight_rule": DOUBLE_BUFFER},
            "before an update makes it",
        ),
        ({"schedule": "pipedream_2bw", "num_stages": 3, "num_microbatches": 2}, "at least 3"),
    ],
)
def test_schedules_that_cannot_be_run(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options).init(CASE.params, CASE.make_batch(4, 0))


# ---------------------------------------------------------------- evaluation in microbatches


@pytest.mark.parametrize("schedule", ["one_f_one_b", "interleaved"])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 6])
def test_evaluation_in_microbatches(schedule, num_microbatches):
    pipe = make(schedule=schedule, num_stages=4, num_microbatches=2)
    batch = CASE.make_batch(12, 5)
    state = pipe.init(CASE.params, CASE.make_batch(4, 0))
    metrics = pipe.evaluate(state, batch, num_microbatches=num_microbatches)
    expected = CASE.loss_fn(CASE.params, batch, KEY)
    chex.assert_trees_all_close(metrics["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_evaluation_on_a_single_stage(num_microbatches):
    pipe = make(num_stages=1, num_microbatches=1)
    batch = CASE.make_batch(6, 5)
    state = pipe.init(CASE.params, CASE.make_batch(4, 0))
    metrics = pipe.evaluate(state, batch, num_microbatches=num_microbatches)
    expected = CASE.loss_fn(CASE.params, batch, KEY)
    chex.assert_trees_all_close(metrics["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_metrics_of_evaluation_in_microbatches(num_microbatches):
    """Means are averaged by weight, counts summed, rows concatenated, constants kept."""

    def loss_fn(params, batch):
        error = (jnp.tanh(batch["x"] @ params["a"]) @ params["b"])[:, 0]
        weight = batch["mask"].sum()
        metrics = {"rows": error, "count": (error > 0).sum(), "three": 3.0, "mean": error.mean()}
        return (jnp.sum(error**2 * batch["mask"]), weight), metrics

    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(3, 3)).astype(np.float32) for name in "ab"}
    batch = {
        "x": rng.normal(size=(8, 3)).astype(np.float32),
        "mask": np.array([1, 0] * 4, np.float32),
    }
    pipe = pdjax.Pipeline(
        loss_fn, optax.sgd(0.1), num_stages=2, num_microbatches=2, weighted_loss=True
    )
    state = pipe.init(params, batch)
    metrics = pipe.evaluate(state, batch, num_microbatches=num_microbatches)
    (total, weight), expected = loss_fn(params, batch)
    chex.assert_trees_all_close(metrics["loss"], total / weight, rtol=1e-5)
    chex.assert_trees_all_close(metrics["rows"], expected["rows"], rtol=1e-5)
    assert int(metrics["count"]) == int(expected["count"])
    assert float(metrics["three"]) == 3.0
    chex.assert_trees_all_close(metrics["mean"], expected["mean"], rtol=1e-4, atol=1e-6)


def test_evaluation_that_does_not_divide():
    pipe = make(num_stages=2, num_microbatches=2)
    state = pipe.init(CASE.params, CASE.make_batch(4, 0))
    with pytest.raises(ValueError, match="num_microbatches=0; expected at least 1"):
        pipe.evaluate(state, CASE.make_batch(4, 0), num_microbatches=0)
    with pytest.raises(ValueError, match="3 equal parts"):
        pipe.evaluate(state, CASE.make_batch(4, 0), num_microbatches=3)


@pytest.mark.parametrize("schedule", ["one_f_one_b", "pipedream", "pipedream_vertical_sync"])
def test_slack_is_an_argument(schedule):
    case = zoo.dense_blocks()
    pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(0.1), schedule=schedule, num_stages=3, slack=1)
    pipe.init(case.params, case.make_batch(8, 0))
    count = pipe.schedule.num_microbatches
    tight, slack = (
        schedules.ALGORITHMS[schedule].make(3, count, slack=slack).workers for slack in (0, 1)
    )
    assert tight != pipe.schedule.workers == slack


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slack": -1}, r"slack=-1; expected a whole number from 0 on"),
        ({"slack": True}, r"slack=True; expected a whole number"),
        ({"slack": 1, "schedule": "gpipe"}, r"'gpipe' has no slack\..*one_f_one_b, pipedream"),
        ({"slack": 1, "schedule": "auto"}, r"schedule='auto' chooses it"),
        ({"update_lag": 1}, r"'one_f_one_b' has no update_lag\..*use one of pipedream\."),
        ({"slack": 0, "schedule": pdjax.gpipe(2, 2)}, r"the schedule has its own"),
        ({"max_batch_shapes": 0}, r"max_batch_shapes=0; expected at least 1"),
    ],
)
def test_schedule_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        pdjax.Pipeline(zoo.dense_blocks().loss_fn, optax.sgd(0.1), **options)


def test_a_plan_brings_its_slack_and_an_argument_goes_before_it():
    case = zoo.dense_blocks(num_blocks=4)
    layers = tuple(LayerProfile(f"block_{i}", 1e-3, 2e-3, 4e5, 8e3, 8e3) for i in range(4))
    profile = pdjax.Profile(layers, batch_size=8)
    plan = pdjax.plan_pipeline(profile, pdjax.Topology.parse("2@1GB/s"))
    assert plan.slack == 1
    for given, expected in ((None, 1), (0, 0), (2, 2)):
        pipe = pdjax.Pipeline(
            case.loss_fn, optax.sgd(0.1), schedule="pipedream", plan=plan, slack=given
        )
        pipe.init(case.params, case.make_batch(8, 0))
        made = pdjax.pipedream(plan.num_stages, replicas=plan.replicas, slack=expected)
        assert pipe.schedule.workers == made.workers
