"""How a Pipeline behaves in a training loop."""

from __future__ import annotations

from itertools import pairwise
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
from pdjax.schedules import ALGORITHMS

KEY = jax.random.key(0)


def chunks_of(schedule: Any) -> int:
    return ALGORITHMS[schedule].num_chunks if isinstance(schedule, str) else 1


def make(case: zoo.Case | None = None, **options: Any) -> tuple[pdjax.Pipeline, Any, Any]:
    case = case or zoo.dense_blocks()
    batch = case.make_batch(options.pop("batch_size", 4), 0)
    stages = options.pop("num_stages", 2)
    options["num_stages"] = stages and stages * chunks_of(options.get("schedule"))
    pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(0.1), **options)
    return pipe, pipe.init(case.params, batch, rng=KEY), batch


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("schedule", ALGORITHMS)
def test_a_second_step_compiles_nothing(schedule, compilations):
    pipe, state, batch = make(schedule=schedule, num_stages=3)
    state, _ = pipe.step(state, batch)
    compilations.clear()
    for seed in range(1, 6):
        state, _ = pipe.step(state, zoo.dense_blocks().make_batch(4, seed))
    state = pipe.drain(state)
    jax.block_until_ready(state.run.stages[0].lasting.weights)
    assert compilations == []


@pytest.mark.parametrize("schedule", ALGORITHMS)
def test_init_compiles_all_that_a_step_runs(schedule, compilations):
    """All but the copies of the batch and the mean of the losses, which are small."""
    pipe, state, batch = make(schedule=schedule, num_stages=3)
    assert compilations
    compilations.clear()
    pipe.step(state, batch)
    assert len(compilations) <= 4


def test_a_number_in_the_program_that_crosses_a_cut_compiles_nothing_anew(compilations):
    """Its type is weak, as that of Python's numbers: it has to be the same for what reads it."""

    def loss_fn(params, batch):
        x = jnp.tanh(batch["x"] @ params["block_0"]["w"])
        sign = jnp.where(x.sum() > 0, 1.0, -1.0)
        for i in range(1, 6):
            x = jnp.tanh(x @ params[f"block_{i}"]["w"])
        return jnp.mean((sign * x - batch["y"]) ** 2)

    batch = CASE.make_batch(4, 0)
    pipe = pdjax.Pipeline(loss_fn, optax.sgd(0.1), num_stages=3, num_microbatches=2)
    state = pipe.init(CASE.params, batch)
    compilations.clear()
    pipe.step(state, batch)
    assert len(compilations) <= 4  # copies of the batch, and the mean of the losses


def test_numpy_batches_may_be_overwritten_at_once():
    """Behind a busy device, in memory that JAX would take over without a copy if it were let."""
    results = []
    for spoils in (False, True):
        pipe, state, batch = busy(num_products=10)
        batch = jax.tree.map(_aligned, batch)
        for _ in range(4):
            state, _ = pipe.step(state, batch)
            if spoils:
                batch["x"] += 1.0
            else:
                batch = {**batch, "x": _aligned(batch["x"] + 1.0)}
        results.append(pipe.params(state))
    chex.assert_trees_all_equal(*results)


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_batches_on_a_device_may_be_deleted_under_an_asynchronous_schedule():
    case = zoo.dense_blocks()
    pipe, state, _ = make(case, schedule="pipedream", num_stages=3)
    for seed in range(5):
        batch = jax.device_put(case.make_batch(4, seed), jax.devices()[0])
        state, _ = pipe.step(state, batch)
        for leaf in batch.values():
            leaf.delete()
    expected, _ = _run_for(case, 5)
    chex.assert_trees_all_close(pipe.params(pipe.drain(state)), expected, atol=1e-6)


def _run_for(case: zoo.Case, steps: int) -> tuple[Any, Any]:
    pipe, state, _ = make(case, schedule="pipedream", num_stages=3)
    for seed in range(steps):
        state, _ = pipe.step(state, case.make_batch(4, seed))
    return pipe.params(pipe.drain(state)), pipe


def test_the_parameters_handed_in_are_left_alone():
    case = zoo.dense_blocks()
    params = jax.device_put(case.params, jax.devices()[0])
    pipe = pdjax.Pipeline(case.loss_fn, optax.adam(0.1), num_stages=2)
    batch = case.make_batch(4, 0)
    state = pipe.init(params, batch)
    for _ in range(3):
        state, _ = pipe.step(state, batch)
    chex.assert_trees_all_equal(params, case.params)


def test_the_parameters_handed_out_are_left_alone():
    pipe, state, batch = make()
    before = pipe.params(state)
    copy = jax.tree.map(np.array, before)
    for _ in range(3):
        state, _ = pipe.step(state, batch)
    chex.assert_trees_all_equal(before, copy)


def busy(num_products: int, **options: Any) -> tuple[pdjax.Pipeline, Any, Any]:
    """A pipeline whose first stage multiplies large matrices for a while."""

    def loss_fn(p, batch, rng):
        x = jnp.tanh(batch["x"] @ p["w0"])
        large = jnp.full((1024, 1024), x.mean())
        large = jax.lax.fori_loop(0, num_products, lambda _, y: jnp.sin(y @ y), large)
        x = x + jax.lax.stop_gradient(large.mean())
        return jnp.mean((x @ p["w1"]) ** 2)

    params = {"w0": np.ones((4, 4), np.float32), "w1": np.ones((4, 4), np.float32)}
    batch = zoo.dense_blocks().make_batch(4, 0)
    pipe = pdjax.Pipeline(loss_fn, optax.sgd(0.1), num_stages=2, num_microbatches=1, **options)
    return pipe, pipe.init(params, batch), batch


def test_a_step_returns_before_the_devices_are_done():
    pipe, state, batch = busy(num_products=30)
    state, metrics = pipe.step(state, batch)
    assert not metrics["loss"].is_ready()
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_run_ahead_is_bounded(run_ahead):
    pipe, state, batch = busy(num_products=10, run_ahead=run_ahead)
    losses, outstanding = [], []
    for _ in range(6):
        state, metrics = pipe.step(state, batch)
        losses.append(metrics["loss"])
        outstanding.append(sum(not loss.is_ready() for loss in losses))
    assert max(outstanding) == run_ahead


def test_two_models_in_a_row():
    for case in (zoo.dense_blocks(), zoo.mlp(), zoo.dense_blocks(width=3)):
        pipe, state, batch = make(case)
        state, metrics = pipe.step(state, batch)
        expected = case.loss_fn(case.params, batch, jax.random.fold_in(KEY, 0))
        chex.assert_trees_all_close(metrics["loss"], expected, rtol=1e-5)


def test_one_pipeline_for_two_runs():
    case = zoo.dense_blocks()
    pipe, state, batch = make(case)
    first, _ = pipe.step(state, batch)
    again = pipe.init(case.params, batch, rng=KEY)
    second, _ = pipe.step(again, batch)
    chex.assert_trees_all_equal(pipe.params(first), pipe.params(second))


# ---------------------------------------------------------------- evaluation, drains


@pytest.mark.parametrize("schedule", ["gpipe", "zero_bubble_v", "pipedream", "pipedream_2bw"])
def test_evaluation_between_steps_changes_nothing(schedule):
    case = zoo.dense_blocks(dropout=0.2)

    def run(evaluates: bool) -> Any:
        pipe, state, _ = make(case, schedule=schedule, num_stages=3)
        for seed in range(5):
            state, _ = pipe.step(state, case.make_batch(4, seed))
            if evaluates:
                pipe.evaluate(state, case.make_batch(3, 100))
                pipe.params(state)
        return pipe.params(pipe.drain(state))

    chex.assert_trees_all_equal(run(True), run(False))


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("size", [1, 4, 7])
def test_evaluation_at_any_batch_size_with_another_function(size):
    train, test = zoo.transformer(dropout=0.5), zoo.transformer(train=False, dropout=0.5)
    pipe, state, _ = make(train, eval_loss_fn=test.loss_fn, num_stages=3)
    batch = train.make_batch(size, 9)
    got = pipe.evaluate(state, batch)["loss"]
    chex.assert_trees_all_close(got, test.loss_fn(train.params, batch, KEY), rtol=1e-5)


@pytest.mark.usefixtures("compiled_quickly")
def test_evaluation_reads_the_moving_averages():
    train, test = zoo.vgg(batch_norm=True), zoo.vgg(batch_norm=True, train=False)
    batch = train.make_batch(4, 0)
    pipe = pdjax.Pipeline(
        train.loss_fn, optax.sgd(0.1), num_stages=2, num_microbatches=2, eval_loss_fn=test.loss_fn
    )
    state = pipe.init(train.params, batch, model_state=train.model_state)
    for _ in range(3):
        state, _ = pipe.step(state, batch)
    expected, _ = test.loss_fn(pipe.params(state), pipe.model_state(state), batch, KEY)
    chex.assert_trees_all_close(pipe.evaluate(state, batch)["loss"], expected, rtol=1e-4)


def test_evaluation_in_flight_reads_the_newest_weights_of_each_stage():
    case = zoo.dense_blocks()
    pipe, state, batch = make(case, schedule="pipedream", num_stages=3)
    for _ in range(4):
        state, _ = pipe.step(state, batch)
    expected = case.loss_fn(pipe.params(state), batch, KEY)
    chex.assert_trees_all_close(pipe.evaluate(state, batch)["loss"], expected, rtol=1e-5)


def test_a_drain_of_nothing():
    for schedule in ALGORITHMS:
        pipe, state, batch = make(schedule=schedule)
        state = pipe.drain(pipe.drain(state))
        state, _ = pipe.step(state, batch)
        state = pipe.drain(pipe.drain(state))
        assert state.step == 1


def test_stage_of_parameters_has_their_structure_and_tuples_where_tied():
    case = zoo.dense_blocks(num_blocks=3, tied=True)
    pipe, state, _ = make(case, plan=["block_1"])
    assert pipe.stage_of_parameters() == {
        "block_0": {"b": (0, 1), "w": (0, 1)},
        "block_1": {"b": 1, "w": 1},
        "block_2": {"b": 1, "w": 1},  # nobody uses it
    }
    chex.assert_trees_all_equal_structs(pipe.params(state), case.params)


# ---------------------------------------------------------------- other shapes


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("schedule", ["one_f_one_b", "pipedream"])
def test_a_new_batch_shape_is_traced_again_and_said_once(schedule, caplog):
    case = zoo.transformer()
    m = 2 if schedule == "one_f_one_b" else 1

    def batch_of(length: int, seed: int) -> Any:
        tokens = np.random.default_rng(seed).integers(0, 11, (4, length + 1), dtype=np.int32)
        return {"x": tokens[:, :-1], "y": tokens[:, 1:]}

    batches = [batch_of(length, seed) for seed, length in enumerate((4, 6, 4, 6, 6, 4))]
    pipe = pdjax.Pipeline(
        case.loss_fn, optax.sgd(0.1), schedule=schedule, num_stages=2, num_microbatches=m
    )
    with caplog.at_level("INFO", logger="pdjax"):
        state = pipe.init(case.params, batches[0], rng=KEY)
        for batch in batches:
            state, _ = pipe.step(state, batch)
        state = pipe.drain(state)
    if schedule == "one_f_one_b":
        params, _, _ = oracle.replay_synchronous(
            case.loss_fn, optax.sgd(0.1), case.params, batches, 2, KEY
        )
    else:
        params, _, _ = oracle.replay_asynchronous(
            case.loss_fn,
            optax.sgd(0.1),
            case.params,
            batches,
            pipe.stage_of_parameters(),
            2,
            KEY,
        )
    chex.assert_trees_all_close(pipe.params(state), params, atol=5e-6, rtol=1e-5)
    said = [record.message for record in caplog.records if "new batch shape" in record.message]
    assert len(said) == 1
    assert "int32[4, 6]" in said[0]


# ---------------------------------------------------------------- what goes wrong


def test_a_state_is_used_once():
    pipe, state, batch = make()
    pipe.step(state, batch)
    for use in (lambda: pipe.step(state, batch), lambda: pipe.params(state)):
        with pytest.raises(ValueError, match=r"was used before.*state, metrics = pipe.step"):
            use()


def test_a_refused_batch_leaves_the_state_as_it_was():
    pipe, state, batch = make(num_microbatches=2)
    with pytest.raises(ValueError, match="does not divide"):
        pipe.step(state, zoo.dense_blocks().make_batch(3, 0))
    state, _ = pipe.step(state, batch)
    assert state.step == 1


def test_a_state_of_another_pipeline():
    _, state, batch = make()
    other, _, _ = make()
    with pytest.raises(ValueError, match="another Pipeline"):
        other.step(state, batch)
    with pytest.raises(ValueError, match="in the place of the state"):
        other.step(batch, batch)  # pyright: ignore[reportArgumentType]


def test_nothing_before_init():
    pipe = pdjax.Pipeline(zoo.dense_blocks().loss_fn, optax.sgd(0.1), num_stages=2)
    with pytest.raises(ValueError, match=r"call Pipeline\.init"):
        _ = pipe.plan


def take_steps(pipe: pdjax.Pipeline, state: Any, batches: list[Any], seen: Any = None) -> None:
    """Takes steps, notes the state after each, and asks for the parameters at the end."""
    for batch in batches:
        state, _ = pipe.step(state, batch)
        if seen is not None:
            seen.append(state)
    pipe.params(state)


@pytest.mark.parametrize("schedule", ["one_f_one_b", "pipedream"])
def test_an_exception_in_a_stage_reaches_the_caller_and_breaks_the_pipeline(schedule):
    calls = []

    def sometimes(x):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the disk is on fire")
        return np.asarray(x)

    def loss_fn(p, batch, rng):
        x = jnp.tanh(batch["x"] @ p["w0"])
        gate = jax.lax.stop_gradient(x[0, 0])
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        x = jnp.tanh(x @ p["w1"]) * (1 + 0 * jax.pure_callback(sometimes, shape, gate))
        return jnp.mean((x @ p["w2"]) ** 2)

    params = {f"w{i}": np.ones((4, 4), np.float32) for i in range(3)}
    batch = zoo.dense_blocks().make_batch(4, 0)
    pipe = pdjax.Pipeline(
        loss_fn, optax.sgd(0.1), schedule=schedule, num_stages=3, num_microbatches=1
    )
    state = pipe.init(params, batch)
    with pytest.raises(pdjax.BrokenPipelineError, match=r"(?s)step 2 failed .*the disk is on fire"):
        take_steps(pipe, state, [batch] * 12)
    with pytest.raises(pdjax.BrokenPipelineError, match="this Pipeline is broken: step 2"):
        pipe.step(state, batch)
    state = pipe.init(params, batch)
    state, metrics = pipe.step(state, batch)
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("schedule", ["one_f_one_b", "pipedream"])
def test_a_loss_that_is_nan_stops_training_and_names_its_step(schedule):
    case = zoo.dense_blocks()
    pipe, state, good = make(case, schedule=schedule, run_ahead=3)
    bad = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), good)
    seen: list[pdjax.PipelineState] = []
    with pytest.raises(pdjax.NonFiniteLossError, match=r"loss of step 3 .*is nan"):
        take_steps(pipe, state, [good, good, good, bad, *[good] * 8], seen)
    assert 3 < seen[-1].step <= 3 + 3, "it stops within the bound of run_ahead"
    pipe.params(seen[-1])


def test_a_loss_that_is_nan_is_ignored_if_told_so():
    case = zoo.dense_blocks()
    pipe, state, _ = make(case, nonfinite="ignore")
    bad = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), case.make_batch(4, 0))
    for _ in range(6):
        state, _ = pipe.step(state, bad)
    assert state.step == 6


CASE = zoo.dense_blocks()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "1f1b"}, "unknown schedule '1f1b'; expected one of .* Did you mean"),
        ({"num_stages": 6}, "6 stages need as many devices, but there are 5.*num_stages=5"),
        ({"num_stages": 0}, "0 stages need"),
        ({"num_microbatches": 0}, "num_microbatches=0; expected at least 1"),
        ({"num_stages": 3, "plan": ["block_1"]}, "disagree about the number of stages"),
        ({"schedule": pdjax.gpipe(3, 2), "num_stages": 2}, "disagree about the number of stages"),
        ({"schedule": pdjax.gpipe(2, 2), "num_microbatches": 3}, "the schedule is for 2"),
        ({"remat": "some"}, "remat='some'; expected one of 'none', 'full'"),
        ({"remat": ["none"] * 3, "num_stages": 2}, "disagree.*'remat': 3"),
        ({"nonfinite": "warn"}, "nonfinite='warn'; expected one of"),
        ({"state_update": "never"}, "state_update='never'; expected one of"),
        ({"run_ahead": 0}, "run_ahead=0; expected at least 1"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        pdjax.Pipeline(CASE.loss_fn, optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("options", "batch", "message"),
    [
        ({"num_microbatches": 3}, {}, "4 examples does not divide .*multiple of 3, or"),
        ({"plan": ["block_9"]}, {}, "no layer or module 'block_9'. Did you mean 'block_5'"),
        ({"batch_axes": {"x": 0}}, {}, "batch_axes .* does not fit"),
        ({"batch_axes": 5}, {}, "has no axis 5"),
        ({}, {"y": np.ones((3, 4), np.float32)}, "disagree about the number of examples"),
        ({"schedule": "pipedream", "num_microbatches": 2}, {}, "minibatch as one microbatch"),
        ({"plan": pdjax.Plan(("a", "b"), (0, 1))}, {}, "made for another model"),
    ],
)
def test_what_cannot_work_together_is_refused_before_anything_is_compiled(
    options, batch, message, compilations
):
    pipe = pdjax.Pipeline(CASE.loss_fn, optax.sgd(0.1), **{"num_stages": 2, **options})
    with pytest.raises(ValueError, match=message):
        pipe.init(CASE.params, {**CASE.make_batch(4, 0), **batch})
    assert compilations == []


def test_more_stages_than_layers():
    case = zoo.dense_blocks(num_blocks=2)
    pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(0.1), num_stages=3)
    with pytest.raises(ValueError, match=r"3 stages .* has 2: block_0, block_1. Use num_stages=2"):
        pipe.init(case.params, case.make_batch(6, 0))


def test_tied_weights_under_an_asynchronous_schedule():
    case = zoo.dense_blocks(tied=True)
    pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(0.1), schedule="pipedream", num_stages=2)
    with pytest.raises(ValueError, match=r"'block_0/.' is used by stages \[0, 1\].*untie"):
        pipe.init(case.params, case.make_batch(2, 0))
    together = pdjax.Pipeline(
        zoo.dense_blocks(num_blocks=3, tied=True).loss_fn,
        optax.sgd(0.1),
        schedule="pipedream",
        num_stages=1,
    )
    small = zoo.dense_blocks(num_blocks=3, tied=True)
    together.init(small.params, small.make_batch(2, 0))


def test_a_batch_of_another_structure():
    pipe, state, batch = make()
    with pytest.raises(ValueError, match=r"missing \['y'\], unexpected \['z'\]"):
        pipe.step(state, {"x": batch["x"], "z": batch["y"]})


def test_more_microbatches_than_examples_names_the_nearest_that_works():
    pipe = pdjax.Pipeline(CASE.loss_fn, optax.sgd(0.1), num_stages=2, num_microbatches=8)
    with pytest.raises(ValueError, match="or num_microbatches=6"):
        pipe.init(CASE.params, CASE.make_batch(6, 0))


# ---------------------------------------------------------------- a schedule of one's own


def test_a_schedule_written_by_hand_is_run_as_it_stands():
    """Stage 1 goes backward in another order than GPipe and 1F1B do."""
    action = pdjax.Action
    forward = [[action("F", s, k) for k in range(3)] for s in range(2)]
    order = (1, 2, 0)
    backward = [[action("B", s, k) for k in order] for s in range(2)]
    workers = tuple((*forward[s], *backward[s], action("U", s, 2)) for s in range(2))
    schedule = pdjax.Schedule("mine", 2, 3, workers)
    case = zoo.dense_blocks()
    pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(0.1), schedule=schedule)
    batch = case.make_batch(6, 0)
    state = pipe.init(case.params, batch, rng=KEY)
    seen: list[tuple[str, int, int]] = []
    state.executor.observer = lambda kind, stage, k, made: seen.append((kind, stage, k))
    state, _ = pipe.step(state, batch)
    for s in range(2):
        mine = [f"{stage}{kind}{k}" for kind, stage, k in seen if stage == s]
        assert mine == [str(a) for a in workers[s]]
    params, _, _ = oracle.replay_synchronous(
        case.loss_fn, optax.sgd(0.1), case.params, [batch], 3, KEY
    )
    chex.assert_trees_all_close(pipe.params(state), params, atol=2e-6)
    assert pipe.schedule is schedule


@pytest.mark.parametrize("schedule", ALGORITHMS)
def test_executed_order_is_planned_order(schedule):
    pipe, state, batch = make(schedule=schedule, num_stages=3)
    seen: list[tuple[str, int, int]] = []
    state.executor.observer = lambda kind, stage, k, made: seen.append((kind, stage, k))
    for _ in range(4):
        state, _ = pipe.step(state, batch)
    pipe.drain(state)
    for worker, planned in enumerate(pipe.schedule.unroll(4)):
        executed = [
            f"{stage}{letter}{k}"
            for kind, stage, k in seen
            if pipe.schedule.worker_of(stage) == worker
            for letter in kind
        ]
        assert executed == [str(action) for action in planned]


# ---------------------------------------------------------------- timelines


@pytest.mark.parametrize("schedule", ["gpipe", "pipedream", "zero_bubble_v"])
def test_a_recorded_timeline_has_every_action_in_the_workers_order(schedule):
    pipe, state, batch = make(schedule=schedule, num_stages=3)
    for _ in range(3):
        state, _ = pipe.step(state, batch)
    with pipe.record(state):
        for _ in range(4):
            state, _ = pipe.step(state, batch)
    timeline = pipe.timeline()
    steps = 4 * pipe.schedule.num_microbatches
    for worker in range(3):
        spans = timeline.spans_of(worker)
        assert sum("F" in span.kind for span in spans) == steps * chunks_of(schedule)
        done = "".join(span.kind for span in spans)
        assert done.count("B") + done.count("I") == steps * chunks_of(schedule)
        assert done.count("I") == done.count("W")
        for before, after in pairwise(spans):
            assert before.end_s <= after.start_s + 1e-9
    assert 0 <= timeline.bubble_share < 1


def test_nothing_was_recorded():
    pipe, _, _ = make()
    with pytest.raises(ValueError, match="nothing was recorded"):
        pipe.timeline()
