"""What once went wrong, so that it does not again."""

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
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pdjax

KEY = jax.random.key(5)
SGD = optax.sgd(0.1)
BATCH = zoo.dense_blocks().make_batch(4, 0)


def weights(count: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"w{i}": rng.normal(size=(4, 4)).astype(np.float32) / 2 for i in range(count)}


def network(params: Any, x: Any) -> Any:
    for i in range(4):
        x = jnp.tanh(x @ params[f"w{i}"])
    return x


def loss_of(params: Any, batch: Any) -> Any:
    return jnp.mean((network(params, batch["x"]) - batch["y"]) ** 2)


def check(loss_fn: Any, params: Any, batch: Any = BATCH, model_state: Any = None, **options: Any):
    """Compares two steps with one device; returns the last metrics."""
    options = {"num_stages": 3, "num_microbatches": 2, **options}
    pipe = pdjax.Pipeline(loss_fn, SGD, **options)
    state = pipe.init(params, batch, model_state=model_state, rng=KEY)
    metrics = {}
    for _ in range(2):
        state, metrics = pipe.step(state, batch)
    expected, _, expected_state = oracle.replay_synchronous(
        loss_fn, SGD, params, [batch] * 2, options["num_microbatches"], KEY, model_state
    )
    chex.assert_trees_all_close(pipe.params(state), expected, atol=1e-6, rtol=1e-5)
    chex.assert_trees_all_close(pipe.model_state(state), expected_state, atol=1e-6, rtol=1e-5)
    return metrics


# ---------------------------------------------------------------- what is differentiated


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_a_zero_gradient_is_not_sent_into_what_is_infinite(num_stages):
    """The norm of an empty row has no derivative; `round` hides that from `jax.grad`."""

    def loss_fn(p, batch, rng):
        h = batch["x"] @ p["w0"]
        norm = jnp.linalg.norm(h, axis=-1, keepdims=True)
        x = jnp.tanh(h @ p["w1"]) * jnp.round(norm + 1)
        return jnp.mean((jnp.tanh(x @ p["w2"]) @ p["w3"] - batch["y"]) ** 2)

    batch = {**BATCH, "x": BATCH["x"] * np.array([[0], [1], [1], [1]], np.float32)}
    check(loss_fn, weights(), batch, num_stages=num_stages)


def test_a_rule_that_gives_no_gradient_stops_it_at_a_cut_too():
    @jax.custom_vjp
    def scale(x, factor):
        return x * factor

    scale.defvjp(lambda x, factor: (x * factor, factor), lambda factor, g: (g * factor, None))

    def loss_fn(p, batch, rng):
        h = batch["x"] @ p["w0"]
        x = jnp.tanh(h @ p["w1"])
        x = scale(x, jnp.sqrt(jnp.sum(h**2, -1, keepdims=True)))
        return jnp.mean((jnp.tanh(x @ p["w2"]) @ p["w3"] - batch["y"]) ** 2)

    batch = {**BATCH, "x": BATCH["x"] * np.array([[0], [1], [1], [1]], np.float32)}
    check(loss_fn, weights(), batch, num_stages=4)


def test_what_has_no_derivative_may_stand_behind_a_step_function():
    def double(x):
        return np.asarray(2 * x)

    def loss_fn(p, batch, rng):
        h = jnp.tanh(batch["x"] @ p["w0"])
        h = jnp.floor(jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1.0, h)) + h
        x = jnp.tanh(h @ p["w1"])
        x = x + jax.pure_callback(double, jax.ShapeDtypeStruct(h.shape, h.dtype), jnp.sign(h))
        return jnp.mean((jnp.tanh(x @ p["w2"]) @ p["w3"] - batch["y"]) ** 2)

    check(loss_fn, weights(), num_stages=4, num_microbatches=1)


def test_python_numbers_take_on_the_type_of_what_they_meet():
    seen = []

    def loss_fn(p, batch, rng):
        x = batch["x"].astype(jnp.bfloat16) * p["scale"] * batch["factor"]
        seen.append(x.dtype)
        return loss_of(p, {**batch, "x": x}).astype(jnp.float32)

    params, batch = {**weights(), "scale": 1.3}, {**BATCH, "factor": 0.5}
    axes = {"x": 0, "y": 0, "factor": None}
    pipe = pdjax.Pipeline(loss_fn, SGD, num_stages=2, num_microbatches=1, batch_axes=axes)
    state = pipe.init(params, batch)
    state, _ = pipe.step(state, batch)
    assert set(seen) == {jnp.dtype("bfloat16")}
    gradient = jax.jit(jax.grad(loss_fn))(params, batch, KEY)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    chex.assert_trees_all_close(pipe.params(state), expected, rtol=1e-3)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("name", ["key_padding_mask", "monkey", "rng_free"])
def test_an_argument_that_only_sounds_like_a_key_keeps_its_default(name):
    scope: dict[str, Any] = {"loss_of": loss_of}
    exec(
        f"def loss_fn(p, batch, {name}=None):\n assert {name} is None\n return loss_of(p, batch)",
        scope,
    )
    check(lambda p, batch, rng: scope["loss_fn"](p, batch), weights())
    pdjax.Pipeline(scope["loss_fn"], SGD, num_stages=2).init(weights(), BATCH)


def test_a_key_may_be_wanted_by_name():
    def loss_fn(p, batch, *, rng):
        noise = jax.random.normal(rng, batch["x"].shape)
        return loss_of(p, {**batch, "x": batch["x"] + noise})

    def by_position(p, batch, rng):
        return loss_fn(p, batch, rng=rng)

    pipe = pdjax.Pipeline(loss_fn, SGD, num_stages=2, num_microbatches=1)
    state = pipe.init(weights(), BATCH, rng=KEY)
    _, metrics = pipe.step(state, BATCH)
    expected = by_position(weights(), BATCH, jax.random.fold_in(KEY, 0))
    chex.assert_trees_all_close(metrics["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": optax.adam}, "called with its settings"),
        ({"devices": 2}, "expected a list with one device"),
        ({"devices": []}, "expected a list with one device"),
        ({"devices": [0]}, "expected jax.Device objects"),
        ({"plan": "w2"}, r"plan=\['w2'\]"),
        ({"schedule": pdjax.gpipe}, "expected a name such as"),
    ],
)
def test_slips_of_the_hand_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pdjax.Pipeline(lambda p, b, r: loss_of(p, b), **{"optimizer": SGD, **options})


def test_a_stage_on_several_devices_is_refused():
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    with pytest.raises(ValueError, match="one device each"):
        pdjax.Pipeline(
            lambda p, b, r: loss_of(p, b), SGD, devices=[NamedSharding(mesh, PartitionSpec())]
        )


def test_a_number_is_no_random_key():
    pipe = pdjax.Pipeline(lambda p, b, r: loss_of(p, b), SGD, num_stages=2)
    with pytest.raises(ValueError, match=r"jax.random.key\(0\)"):
        pipe.init(weights(), BATCH, rng=3)


# ---------------------------------------------------------------- one Pipeline, several runs


def test_two_runs_of_one_pipeline_keep_their_keys_and_shapes():
    def loss_fn(p, batch, rng):
        x = batch["x"] * jax.random.bernoulli(rng, 0.5, batch["x"].shape)
        return loss_of(p, {**batch, "x": x})

    pipe = pdjax.Pipeline(loss_fn, SGD, num_stages=2, num_microbatches=1)
    keys = [jax.random.key(seed) for seed in (1, 2)]
    first = pipe.init(weights(), BATCH, rng=keys[0])
    longer = zoo.dense_blocks().make_batch(6, 0)
    second = pipe.init(weights(), longer, rng=keys[1])
    for state, key, batch in ((first, keys[0], BATCH), (second, keys[1], longer)):
        state, metrics = pipe.step(state, batch)
        expected = loss_fn(weights(), batch, jax.random.fold_in(key, 0))
        chex.assert_trees_all_close(metrics["loss"], expected, rtol=1e-5)
        assert list(pipe.params(state)) == list(weights())


@pytest.mark.parametrize("ask", ["drain", "params"])
def test_the_last_step_is_looked_at_too(ask):
    """A loss that takes a while, so that nobody has looked at it when training ends."""

    def loss_fn(p, batch, rng):
        large = jnp.full((1024, 1024), p["w0"].mean())
        large = jax.lax.fori_loop(0, 10, lambda _, y: jnp.sin(y @ y), large)
        return loss_of(p, batch) + jax.lax.stop_gradient(large.mean()) * 0 + jnp.nan

    pipe = pdjax.Pipeline(loss_fn, SGD, num_stages=2, num_microbatches=1)
    state, _ = pipe.step(pipe.init(weights(), BATCH), BATCH)
    with pytest.raises(pdjax.NonFiniteLossError, match="step 0"):
        getattr(pipe, ask)(state)
    pipe.params(state)  # at the second attempt they are handed out


@pytest.mark.parametrize("moment", ["step", "params"])
def test_an_interrupt_while_waiting_leaves_the_state_usable(moment, monkeypatch):
    """Python raises KeyboardInterrupt in whatever waits, here in the look at an old loss."""
    pipe = pdjax.Pipeline(
        lambda p, b, r: loss_of(p, b), SGD, num_stages=2, num_microbatches=1, run_ahead=1
    )
    state, _ = pipe.step(pipe.init(weights(), BATCH), BATCH)

    class Interrupting:
        def is_ready(self):
            return True

        def item(self):
            raise KeyboardInterrupt

    state.training.losses[0] = (0, Interrupting())
    with pytest.raises(KeyboardInterrupt):
        pipe.step(state, BATCH) if moment == "step" else pipe.params(state)
    state.training.losses.clear()
    assert np.isfinite(pipe.params(state)["w0"]).all()
    pipe.step(state, BATCH)


def test_parameters_come_back_where_they_came_from():
    last = jax.devices()[3]
    params = weights()
    given = {
        "w0": params["w0"],
        "w1": jnp.asarray(params["w1"]),
        "w2": jax.device_put(params["w2"], last),
        "w3": params["w3"],
    }
    with jax.default_device(last):
        given["w3"] = jnp.asarray(params["w3"])
    pipe = pdjax.Pipeline(lambda p, b, r: loss_of(p, b), SGD, num_stages=2)
    back = pipe.params(pipe.init(given, BATCH))
    assert isinstance(back["w0"], np.ndarray)
    assert [back[f"w{i}"].device for i in (1, 2, 3)] == [jax.devices()[0], last, last]
    assert [back[f"w{i}"].committed for i in (1, 2, 3)] == [False, True, False]
    chex.assert_trees_all_equal(back, params)


# ---------------------------------------------------------------- batches, metrics, evaluation


def test_a_batch_that_lies_on_several_devices_is_taken_in():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("d",)), PartitionSpec("d"))
    sharded = jax.device_put(BATCH, sharding)
    pipe = pdjax.Pipeline(lambda p, b, r: loss_of(p, b), SGD, num_stages=2, num_microbatches=2)
    state = pipe.init(weights(), sharded)
    expected = loss_of(weights(), BATCH)
    chex.assert_trees_all_close(pipe.evaluate(state, sharded)["loss"], expected, rtol=1e-5)
    state, metrics = pipe.step(state, sharded)
    chex.assert_trees_all_close(metrics["loss"], expected, rtol=1e-5)


def test_a_metric_called_loss_must_be_the_loss():
    def same(p, batch, rng):
        loss = loss_of(p, batch)
        return loss, {"loss": loss}

    def other(p, batch, rng):
        loss = loss_of(p, batch)
        return loss + 1.0, {"loss": loss}

    assert list(check_metrics(same)) == ["loss"]
    with pytest.raises(ValueError, match="another name"):
        check_metrics(other)


def check_metrics(loss_fn: Any, num_microbatches: int = 4) -> Any:
    pipe = pdjax.Pipeline(loss_fn, SGD, num_stages=2, num_microbatches=num_microbatches)
    return pipe.step(pipe.init(weights(), BATCH), BATCH)[1]


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_metrics_mean_the_same_however_many_microbatches(num_microbatches):
    def loss_fn(p, batch, rng):
        loss = loss_of(p, batch)
        flags = jnp.stack([loss > 0, loss < 0])
        return loss, {"positive": loss > 0, "layers": 12, "rate": 0.5, "flags": flags, "key": rng}

    metrics = check_metrics(loss_fn, num_microbatches)
    assert all(isinstance(leaf, jax.Array) for leaf in metrics.values())
    assert metrics["positive"].dtype == jnp.float32
    assert float(metrics["positive"]) == 1.0
    assert int(metrics["layers"]) == 12
    assert float(metrics["rate"]) == 0.5
    assert [float(flag) for flag in metrics["flags"]] == [1.0, 0.0]


def test_weights_of_losses_are_as_exact_as_the_losses():
    def loss_fn(p, batch, rng):
        errors = (network(p, batch["x"]) - batch["y"]) ** 2
        return errors.sum(), jnp.float64(0.1) * errors.size

    with jax.enable_x64(True):
        params, batch = zoo._double(weights()), zoo._double(BATCH)
        pipe = pdjax.Pipeline(loss_fn, SGD, num_stages=2, num_microbatches=2, weighted_loss=True)
        _, metrics = pipe.step(pipe.init(params, batch), batch)
        total, weight = loss_fn(params, batch, KEY)
        chex.assert_trees_all_close(metrics["loss"], total / weight, rtol=1e-14)


def test_evaluation_may_lack_what_a_whole_stage_computes():
    def loss_fn(p, batch, rng):
        loss = loss_of(p, batch)
        return loss + jnp.mean((batch["x"] @ p["w4"] @ p["w5"]) ** 2)

    def eval_loss_fn(p, batch, rng):
        return loss_of(p, batch)

    pipe = pdjax.Pipeline(loss_fn, SGD, plan=["w2", "w4"], eval_loss_fn=eval_loss_fn)
    state = pipe.init(weights(6), BATCH)
    expected = loss_of(weights(), BATCH)
    chex.assert_trees_all_close(pipe.evaluate(state, BATCH)["loss"], expected, rtol=1e-5)


# ---------------------------------------------------------------- mutable state


def _teacher(p, s, batch, rng):
    """Mean teacher: its weights are moved after the loss was computed."""
    x = batch["x"]
    target = jax.lax.stop_gradient(network(s, x))
    loss = jnp.mean((network(p, x) - target) ** 2) + loss_of(p, batch)
    return loss, jax.tree.map(lambda e, q: 0.9 * e + 0.1 * jax.lax.stop_gradient(q), s, p)


def _codebook(p, s, batch, rng):
    """VQ-VAE: the codebook follows what was assigned to it."""
    z = jnp.tanh(batch["x"] @ p["w0"])
    chosen = ((z[:, None] - s["codes"]) ** 2).sum(-1).argmin(-1)
    x = z + jax.lax.stop_gradient(s["codes"][chosen] - z)
    x = jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w2"]) @ p["w3"]
    moved = jax.nn.one_hot(chosen, 5).T @ jax.lax.stop_gradient(z)
    return jnp.mean((x - batch["y"]) ** 2), {"codes": 0.9 * s["codes"] + 0.1 * moved}


def _average(p, s, batch, rng):
    return loss_of(p, batch), jax.tree.map(lambda e, q: 0.9 * e + 0.1 * q, s, p)


CODES = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("loss_fn", "state"),
    [(_teacher, weights()), (_codebook, {"codes": CODES}), (_average, weights())],
)
def test_state_may_be_updated_after_the_loss(loss_fn, state):
    check(loss_fn, weights(), model_state=state, num_stages=2)


def test_an_average_of_the_weights_is_kept_where_they_are():
    pipe = pdjax.Pipeline(_average, SGD, schedule="pipedream", num_stages=2)
    state = pipe.init(weights(), BATCH, model_state=weights())
    assert set(pipe.stage_of_parameters().values()) == {0, 1}
    state, _ = pipe.step(state, BATCH)
    pipe.model_state(pipe.drain(state))


def test_state_by_the_minibatch_is_state_by_the_microbatch_if_it_has_only_one():
    def loss_fn(p, s, batch, rng):
        loss = loss_of(p, batch)
        return loss, {"mean": 0.9 * s["mean"] + 0.1 * jnp.tanh(batch["x"] @ p["w0"]).mean()}

    results = []
    for how in ("microbatch", "minibatch"):
        pipe = pdjax.Pipeline(loss_fn, SGD, schedule="pipedream", num_stages=3, state_update=how)
        state = pipe.init(weights(), BATCH, model_state={"mean": np.float32(1.0)})
        for _ in range(4):
            state, _ = pipe.step(state, BATCH)
        results.append(pipe.model_state(pipe.drain(state)))
    chex.assert_trees_all_equal(*results)


def test_state_by_the_minibatch_needs_a_flush():
    pipe = pdjax.Pipeline(
        _average,
        SGD,
        schedule=_backward_first(num_microbatches=2),
        state_update="minibatch",
    )
    with pytest.raises(ValueError, match="state_update='microbatch'"):
        pipe.init(weights(), BATCH, model_state=weights())


# ---------------------------------------------------------------- asynchronous schedules


def _backward_first(num_microbatches: int) -> pdjax.Schedule:
    """One stage that in every step first finishes the minibatch of the step before."""
    m = num_microbatches
    actions = [
        *(pdjax.Action("B", 0, k - m) for k in range(m)),
        pdjax.Action("U", 0, -1),
        *(pdjax.Action("F", 0, k) for k in range(m)),
    ]
    return pdjax.Schedule("backward_first", 1, m, (tuple(actions),))


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_weighted_loss_whose_backward_comes_a_step_later(num_microbatches):
    def loss_fn(p, batch, rng):
        errors = (network(p, batch["x"]) - batch["y"]) ** 2
        return errors.sum(), float(errors.size)

    pipe = pdjax.Pipeline(
        loss_fn, SGD, schedule=_backward_first(num_microbatches), weighted_loss=True
    )
    state = pipe.init(weights(), BATCH)
    for _ in range(3):
        state, _ = pipe.step(state, BATCH)
    params = pipe.params(pipe.drain(state))
    expected = weights()
    for _ in range(3):
        gradient = jax.grad(loss_of)(expected, BATCH)
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, gradient)
    chex.assert_trees_all_close(params, expected, atol=1e-5)


def test_a_weight_may_be_larger_than_the_gradients_dtype_holds():
    def loss_fn(p, batch, rng):
        x = batch["x"].astype(jnp.float16)
        for i in range(4):
            x = jnp.tanh(x @ p[f"w{i}"])
        return ((x - batch["y"]) ** 2).astype(jnp.float32).mean() * 1e5, 1e5

    half = jax.tree.map(lambda leaf: leaf.astype(np.float16), weights())
    pipe = pdjax.Pipeline(loss_fn, SGD, num_stages=2, num_microbatches=1, weighted_loss=True)
    state, _ = pipe.step(pipe.init(half, BATCH), BATCH)
    moved = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - b).max()), pipe.params(state), half
    )
    assert min(moved.values()) > 0


def test_the_users_of_a_tied_weight_are_kept_together_without_being_asked():
    def loss_fn(p, batch, rng):
        x = batch["x"]
        for name in ("w0", "w1", "w2", "w3", "w2", "w4"):
            x = jnp.tanh(x @ p[name])
        return jnp.mean((x - batch["y"]) ** 2)

    pipe = pdjax.Pipeline(loss_fn, SGD, schedule="pipedream", num_stages=2)
    pipe.init(weights(5), BATCH)
    assert all(isinstance(stage, int) for stage in pipe.stage_of_parameters().values())


def test_an_optimizer_that_remembers_gradients_mixes_nothing():
    def init(params):
        return (jax.tree.map(jnp.zeros_like, params),) * 3

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -0.1 * g, state[2]), (updates, state[0], state[1])

    delayed = optax.GradientTransformation(init, update)
    pipe = pdjax.Pipeline(
        lambda p, b, r: loss_of(p, b), delayed, schedule="pipedream", num_stages=3
    )
    pipe.init(weights(), BATCH)


def test_side_effects_of_an_optimizer_are_refused():
    def update(updates, state, params=None):
        jax.debug.print("here")
        return updates, state

    printing = optax.GradientTransformation(lambda params: (), update)
    with pytest.raises(ValueError, match="side effects"):
        pdjax.Pipeline(lambda p, b, r: loss_of(p, b), printing, num_stages=2).init(weights(), BATCH)


def test_an_optimizer_that_needs_the_loss_is_refused():
    optimizer = optax.chain(SGD, optax.contrib.reduce_on_plateau())
    with pytest.raises(ValueError, match="'value'"):
        pdjax.Pipeline(lambda p, b, r: loss_of(p, b), optimizer, num_stages=2).init(
            weights(), BATCH
        )


# ---------------------------------------------------------------- NNX


def test_a_weighted_loss_of_an_nnx_module():
    def loss_fn(model, batch, label_smoothing=0.1):
        errors = (model(batch["x"]) - batch["y"]) ** 2
        return errors.sum(), errors.size * (1 + label_smoothing)

    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    f = pdjax.nnx.functionalize(model, loss_fn, weighted_loss=True)
    pipe = pdjax.Pipeline(f.loss_fn, SGD, num_stages=1, num_microbatches=2, weighted_loss=True)
    _, metrics = pipe.step(pipe.init(f.params, BATCH, model_state=f.model_state), BATCH)
    expected = jnp.mean((model(BATCH["x"]) - BATCH["y"]) ** 2) / 1.1
    chex.assert_trees_all_close(metrics["loss"], expected, rtol=1e-5)
