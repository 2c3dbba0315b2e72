"""What unmodified loss functions do, on several stages as on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import zoo

import pdjax

KEY = jax.random.key(1)
WIDTH = 4


class Tower(nn.Module):
    """A few dense layers, with what a feature needs in between."""

    block: Callable[[], nn.Module]
    num_blocks: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_blocks):
            x = self.block(name=f"block_{i}")(x)  # pyright: ignore[reportCallIssue]
        return nn.Dense(1, name="head")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.tanh(nn.Dense(WIDTH)(nn.LayerNorm()(x)))


def regression(model: nn.Module) -> zoo.Case:
    def loss_fn(params: Any, batch: Any, rng: Any) -> Any:
        output: Any = model.apply(params, batch["x"], rngs={"dropout": rng})
        return jnp.mean((output - batch["y"]) ** 2)

    def make_batch(size: int, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return {
            "x": rng.normal(size=(size, WIDTH)).astype(np.float32),
            "y": rng.normal(size=(size, 1)).astype(np.float32),
        }

    params = jax.jit(model.init)(jax.random.key(0), make_batch(2, 0)["x"])
    return zoo.Case(loss_fn, params, None, make_batch)


def functional(body: Callable[[Any, Any, Any], Any], **params: Any) -> zoo.Case:
    """A case whose loss is `body` over plain parameters, on the batches of `zoo.dense_blocks`."""
    return zoo.Case(body, params, None, zoo.dense_blocks().make_batch)


def weights(count: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"w{i}": rng.normal(size=(4, 4)).astype(np.float32) / 2 for i in range(count)}


def skip_over_stages() -> zoo.Case:
    def loss_fn(p, batch, rng):
        first = x = jnp.tanh(batch["x"] @ p["w0"])
        for i in range(1, 5):
            x = jnp.tanh(x @ p[f"w{i}"])
        return jnp.mean((x + first - batch["y"]) ** 2)

    return functional(loss_fn, **weights(5))


def value_used_twice() -> zoo.Case:
    def loss_fn(p, batch, rng):
        shared = jnp.tanh(batch["x"] @ p["w0"])
        left = jnp.tanh(shared @ p["w1"])
        right = jnp.tanh((left + shared) @ p["w2"])
        return jnp.mean((right @ p["w3"] + shared - batch["y"]) ** 2)

    return functional(loss_fn, **weights(4))


def nested_jit() -> zoo.Case:
    @jax.jit
    def two(p, x):
        return jax.jit(jnp.tanh)(x @ p[0]) @ p[1]

    def loss_fn(p, batch, rng):
        x = two((p["w0"], p["w1"]), batch["x"])
        return jnp.mean((two((p["w2"], p["w3"]), x) - batch["y"]) ** 2)

    return functional(jax.jit(loss_fn), **weights(4))


def custom_vjp() -> zoo.Case:
    @jax.custom_vjp
    def layer(w, x):
        return jnp.tanh(x @ w)

    def forward(w, x):
        y = layer(w, x)
        return y, (w, x, y)

    def backward(saved, g):
        w, x, y = saved
        g = 2.0 * g * (1 - y**2)  # twice the true gradient, to see that it is this one that runs
        return x.T @ g, g @ w.T

    layer.defvjp(forward, backward)

    def loss_fn(p, batch, rng):
        x = batch["x"]
        for i in range(4):
            x = layer(p[f"w{i}"], x)
        return jnp.mean((x - batch["y"]) ** 2)

    return functional(loss_fn, **weights(4))


def integers_cross() -> zoo.Case:
    """Integers, booleans and a random key made on the way decide what later layers do."""

    def loss_fn(p, batch, rng):
        x = jnp.tanh(batch["x"] @ p["w0"])
        best, positive = jnp.argmax(x, -1), x > 0
        key = jax.random.fold_in(rng, best[0])
        x = jnp.tanh(x @ p["w1"])
        x = jnp.where(positive, x, -x) + jax.nn.one_hot(best, 4)
        x = jnp.tanh(x @ p["w2"]) + jax.random.normal(key, x.shape)
        return jnp.mean((x @ p["w3"] - batch["y"]) ** 2)

    return functional(loss_fn, **weights(4))


def bf16_tree_and_l2() -> zoo.Case:
    """A scale of every size, a cast of the whole tree and a penalty on it."""

    def loss_fn(p, batch, rng):
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
        x = batch["x"]
        for i in range(4):
            x = jnp.tanh(x @ low[f"w{i}"].T) * low["scale"]
        return jnp.mean((x - batch["y"]) ** 2).astype(jnp.float32) + 0.01 * penalty

    return functional(loss_fn, **weights(4), scale=np.float32(1.5))


def closed_over() -> zoo.Case:
    table = np.random.default_rng(5).normal(size=(64, 4)).astype(np.float32)
    frozen = np.random.default_rng(6).normal(size=(4, 4)).astype(np.float32)

    def loss_fn(p, batch, rng):
        x = batch["x"] @ frozen
        for i in range(4):
            x = jnp.tanh(x @ p[f"w{i}"]) + jnp.asarray(table)[i]
        return jnp.mean((x - batch["y"]) ** 2)

    return functional(loss_fn, **weights(4))


def unused_parameter() -> zoo.Case:
    def loss_fn(p, batch, rng):
        x = batch["x"]
        for i in range(4):
            x = jnp.tanh(x @ p[f"w{i}"])
        return jnp.mean((x - batch["y"]) ** 2)

    return functional(loss_fn, **weights(4), spare=np.ones(3, np.float32))


def weights_made_of_weights() -> zoo.Case:
    """Low-rank additions and normalised weights: parameters that only work together."""

    def loss_fn(p, batch, rng):
        x = batch["x"]
        for i in range(3):
            w = p[f"w{i}"] + p[f"a{i}"] @ p[f"c{i}"]
            x = jnp.tanh(x @ (w / jnp.linalg.norm(w)))
        return jnp.mean((x - batch["y"]) ** 2)

    rng = np.random.default_rng(1)
    low = {
        f"{name}{i}": rng.normal(size=shape).astype(np.float32)
        for i in range(3)
        for name, shape in (("a", (4, 1)), ("c", (1, 4)))
    }
    return functional(loss_fn, **weights(3), **low)


def cond_and_while() -> zoo.Case:
    def loss_fn(p, batch, rng):
        x = batch["x"]
        for i in range(3):
            x = jax.lax.cond(
                x[0, 0] > 0, lambda w, x: jnp.tanh(x @ w), lambda w, x: x @ w, p[f"w{i}"], x
            )
        x = jax.lax.fori_loop(0, 2, lambda _, y: jnp.tanh(y @ p["w3"]), x)
        return jnp.mean((x - batch["y"]) ** 2)

    return functional(loss_fn, **weights(4))


SYNCHRONOUS_ONLY = {"tied": lambda: zoo.dense_blocks(tied=True, skip=True)}
ANY_SCHEDULE: dict[str, Callable[[], zoo.Case]] = {
    "skip over several stages": skip_over_stages,
    "value used by two later stages": value_used_twice,
    "remat": lambda: regression(Tower(nn.remat(Block))),
    "nested jit": nested_jit,
    "custom_vjp": custom_vjp,
    "integers, booleans and keys cross cuts": integers_cross,
    "bf16 tree and L2": bf16_tree_and_l2,
    "closed-over arrays": closed_over,
    "unused parameter": unused_parameter,
    "weights made of weights": weights_made_of_weights,
    "cond and while": cond_and_while,
    "linen": lambda: regression(Tower(Block)),
}


@pytest.mark.grid(1)
@pytest.mark.parametrize("num_stages", [3, 2, 1])
@pytest.mark.parametrize("feature", [*SYNCHRONOUS_ONLY, *ANY_SCHEDULE])
def test_synchronous(feature, num_stages):
    case = {**SYNCHRONOUS_ONLY, **ANY_SCHEDULE}[feature]()
    batches = [case.make_batch(6, seed) for seed in range(2)]
    pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(0.2), num_stages=num_stages, num_microbatches=3)
    state = pipe.init(case.params, batches[0], rng=KEY)
    losses = []
    for batch in batches:
        state, metrics = pipe.step(state, batch)
        losses.append(metrics["loss"])
    params, expected, _ = oracle.replay_synchronous(
        case.loss_fn, optax.sgd(0.2), case.params, batches, 3, KEY
    )
    low = "bf16" in feature
    chex.assert_trees_all_close(losses, expected, rtol=2e-3 if low else 1e-5)
    chex.assert_trees_all_close(pipe.params(state), params, atol=4e-3 if low else 3e-6)


@pytest.mark.grid(1)
@pytest.mark.parametrize("num_stages", [3, 2])
@pytest.mark.parametrize("feature", ANY_SCHEDULE)
def test_asynchronous(feature, num_stages):
    case = ANY_SCHEDULE[feature]()
    batches = [case.make_batch(2, seed) for seed in range(6)]
    pipe = pdjax.Pipeline(
        case.loss_fn, optax.sgd(0.02), schedule="pipedream", num_stages=num_stages
    )
    state = pipe.init(case.params, batches[0], rng=KEY)
    for batch in batches:
        state, _ = pipe.step(state, batch)
    state = pipe.drain(state)
    params, _, _ = oracle.replay_asynchronous(
        case.loss_fn,
        optax.sgd(0.02),
        case.params,
        batches,
        pipe.stage_of_parameters(),
        num_stages,
        KEY,
    )
    low = "bf16" in feature
    chex.assert_trees_all_close(pipe.params(state), params, atol=4e-3 if low else 5e-6)


# ---------------------------------------------------------------- forms of the loss function


def test_takes_no_key():
    case = zoo.dense_blocks()
    batch = case.make_batch(4, 0)
    pipe = pdjax.Pipeline(
        lambda params, batch: case.loss_fn(params, batch, None), optax.sgd(0.1), num_stages=2
    )
    _, metrics = pipe.step(pipe.init(case.params, batch), batch)
    chex.assert_trees_all_close(metrics["loss"], case.loss_fn(case.params, batch, None), rtol=1e-6)


def test_metrics_of_all_forms():
    """Real metrics are averaged, integers summed, those with a batch axis concatenated."""
    case = zoo.dense_blocks()

    def loss_fn(params, batch, rng):
        x = batch["x"] @ params["block_0"]["w"]
        y = x @ params["block_1"]["w"]
        report = {
            "mean": x.mean(),
            "positive": jnp.sum(y > 0),
            "outputs": y,
            "transposed": y.T,
            "per_class": y.mean(0),
            "constant": 3.0,
            "labels": batch["y"],
            "norm": jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))),
        }
        return jnp.mean((y - batch["y"]) ** 2), report

    params = {name: case.params[name] for name in ("block_0", "block_1")}
    batch = case.make_batch(8, 0)
    pipe = pdjax.Pipeline(loss_fn, optax.sgd(0.1), num_stages=2, num_microbatches=4)
    _, metrics = pipe.step(pipe.init(params, batch), batch)
    loss, expected = loss_fn(params, batch, None)
    assert metrics["positive"].dtype == jnp.int32
    chex.assert_trees_all_close(metrics, {"loss": loss, **expected}, atol=1e-5)


def test_metrics_that_are_no_dict():
    case = zoo.dense_blocks()
    batch = case.make_batch(4, 0)
    pipe = pdjax.Pipeline(
        lambda p, b, r: (case.loss_fn(p, b, r), b["x"]), optax.sgd(0.1), num_stages=2
    )
    _, metrics = pipe.step(pipe.init(case.params, batch), batch)
    chex.assert_trees_all_close(metrics["aux"], batch["x"])


@pytest.mark.parametrize("schedule", ["one_f_one_b", "pipedream"])
def test_weighted_loss(schedule):
    """A masked mean is right although the microbatches have masks of different sizes."""
    case = zoo.dense_blocks()

    def masked(params, batch, rng):
        x = batch["x"]
        for i in range(6):
            x = x + jnp.tanh(x @ params[f"block_{i}"]["w"])
        return jnp.sum(batch["mask"][:, None] * (x - batch["y"]) ** 2), jnp.sum(batch["mask"])

    def plain(params, batch, rng):
        total, weight = masked(params, batch, rng)
        return total / weight

    m = 4 if schedule == "one_f_one_b" else 1
    batches = [
        {**case.make_batch(8, s), "mask": np.float32(np.arange(8) < 5 + s)} for s in range(4)
    ]
    pipe = pdjax.Pipeline(
        masked,
        optax.sgd(0.05),
        schedule=schedule,
        num_stages=2,
        num_microbatches=m,
        weighted_loss=True,
    )
    state = pipe.init(case.params, batches[0])
    losses = []
    for batch in batches:
        state, metrics = pipe.step(state, batch)
        losses.append(metrics["loss"])
    state = pipe.drain(state)
    if schedule == "one_f_one_b":
        params, expected, _ = oracle.replay_synchronous(
            plain, optax.sgd(0.05), case.params, batches, 1, KEY
        )
    else:
        stages = pipe.stage_of_parameters()
        params, expected, _ = oracle.replay_asynchronous(
            plain, optax.sgd(0.05), case.params, batches, stages, 2, KEY
        )
    chex.assert_trees_all_close(losses, expected, rtol=1e-5)
    chex.assert_trees_all_close(pipe.params(state), params, atol=3e-6)
    batch = batches[0]
    chex.assert_trees_all_close(
        pipe.evaluate(state, batch)["loss"], plain(params, batch, None), rtol=1e-5
    )


def test_batches_that_are_trees_and_leaves_without_batch_axis():
    case = zoo.dense_blocks()

    def loss_fn(params, batch, rng):
        (x, scale), y = batch["inputs"], batch["more"][0]["y"]
        for i in range(6):
            x = x + jnp.tanh(x @ params[f"block_{i}"]["w"]) * scale
        return jnp.mean((x - y.T) ** 2)

    flat = case.make_batch(6, 0)
    batch = {
        "inputs": (flat["x"], np.array([1.0, 0.5, 2.0, 1.0], np.float32)),
        "more": [{"y": np.ascontiguousarray(flat["y"].T)}],
    }
    pipe = pdjax.Pipeline(
        loss_fn,
        optax.sgd(0.1),
        num_stages=3,
        num_microbatches=3,
        batch_axes={"inputs": (0, None), "more": 1},
    )
    state, metrics = pipe.step(pipe.init(case.params, batch), batch)
    loss, grads = jax.value_and_grad(loss_fn)(case.params, batch, None)
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, case.params, grads)
    chex.assert_trees_all_close(metrics["loss"], loss, rtol=1e-5)
    chex.assert_trees_all_close(pipe.params(state), stepped, atol=2e-6)


def test_a_loop_over_layers_is_one_unit_and_says_so():
    def loss_fn(p, batch, rng):
        x = jnp.tanh(batch["x"] @ p["first"])
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])
        return jnp.mean((x @ p["last"] - batch["y"]) ** 2)

    rng = np.random.default_rng(0)
    params = {
        "first": rng.normal(size=(4, 4)).astype(np.float32),
        "stack": rng.normal(size=(5, 4, 4)).astype(np.float32),
        "last": rng.normal(size=(4, 4)).astype(np.float32),
    }
    batch = zoo.dense_blocks().make_batch(4, 0)
    pipe = pdjax.Pipeline(loss_fn, optax.sgd(0.1), num_stages=3, num_microbatches=2)
    with pytest.warns(pdjax.PdjaxWarning, match="'stack' is a lax.scan over 5 layers"):
        state = pipe.init(params, batch)
    state, _ = pipe.step(state, batch)
    grads = jax.grad(loss_fn)(params, batch, None)
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    chex.assert_trees_all_close(pipe.params(state), stepped, atol=2e-6)


# ---------------------------------------------------------------- mutable state


class SharedNorm(nn.Module):
    """One BatchNorm that two layers far apart share."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = nn.BatchNorm(use_running_average=False, momentum=0.9, name="norm")
        for i in range(4):
            x = nn.tanh(nn.Dense(WIDTH, name=f"dense_{i}")(x))
            if i in (0, 3):
                x = norm(x)
        return x


def shared_norm() -> zoo.Case:
    model = SharedNorm()
    make_batch = zoo.dense_blocks().make_batch
    variables = jax.jit(model.init)(jax.random.key(0), make_batch(2, 0)["x"])

    def loss_fn(params, state, batch, rng):
        y, new = model.apply(
            {"params": params, "batch_stats": state}, batch["x"], mutable=["batch_stats"]
        )
        return jnp.mean((y - batch["y"]) ** 2), new["batch_stats"]

    return zoo.Case(loss_fn, variables["params"], variables["batch_stats"], make_batch)


def replay_statistics(case: zoo.Case, batch: Any, num_microbatches: int) -> list[Any]:
    """The statistics after each microbatch, in order, at the initial parameters."""
    seen, state = [], case.model_state
    for index in range(num_microbatches):
        part = oracle.microbatch(batch, index, num_microbatches)
        _, state = case.loss_fn(case.params, state, part, None)
        seen.append(state)
    return seen


@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b", "model_parallel"])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_state_that_two_stages_write_changes_in_order(schedule, num_stages):
    case = shared_norm()
    batch = case.make_batch(12, 0)
    pipe = pdjax.Pipeline(
        case.loss_fn,
        optax.sgd(0.0),
        schedule=schedule,
        num_stages=num_stages,
        num_microbatches=3,
        plan=[f"dense_{i}" for i in range(1, 4)][: num_stages - 1],
    )
    state = pipe.init(case.params, batch, model_state=case.model_state)
    state, _ = pipe.step(state, batch)
    chex.assert_trees_all_close(
        pipe.model_state(state), replay_statistics(case, batch, 3)[-1], atol=1e-6
    )


@pytest.mark.usefixtures("compiled_quickly")
def test_state_once_a_minibatch():
    """The mean over microbatches of what each makes of the statistics before the minibatch."""
    case = zoo.vgg(batch_norm=True)
    batch = case.make_batch(6, 0)
    pipe = pdjax.Pipeline(
        case.loss_fn,
        optax.sgd(0.0),
        schedule="gpipe",
        num_stages=2,
        num_microbatches=3,
        state_update="minibatch",
    )
    state = pipe.init(case.params, batch, model_state=case.model_state)
    state, _ = pipe.step(state, batch)
    each = []
    for index in range(3):
        part = oracle.microbatch(batch, index, 3)
        each.append(case.loss_fn(case.params, case.model_state, part, jax.random.key(0))[1])
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *each)
    chex.assert_trees_all_close(pipe.model_state(state), mean, atol=1e-5)


def test_state_read_for_the_loss_before_it_is_written_is_refused():
    def loss_fn(params, state, batch, rng):
        x = jnp.tanh(batch["x"] @ params["w0"]) * state["scale"]
        y = jnp.tanh(x @ params["w1"])
        return jnp.mean((y - batch["y"]) ** 2), {"scale": 0.9 * state["scale"] + y.mean()}

    batch = zoo.dense_blocks().make_batch(4, 0)
    pipe = pdjax.Pipeline(loss_fn, optax.sgd(0.1), num_stages=2)
    with pytest.raises(ValueError, match=r"'scale' is read .* stage 0 and updated on stage 1"):
        pipe.init(weights(2), batch, model_state={"scale": np.float32(1.0)})


def test_state_read_on_a_stage_after_the_one_that_writes_it_is_refused():
    def loss_fn(params, state, batch, rng):
        x = jnp.tanh(batch["x"] @ params["w0"])
        new = 0.9 * state["scale"] + x.mean()
        y = jnp.tanh((x * new) @ params["w1"]) * state["scale"]
        return jnp.mean((y - batch["y"]) ** 2), {"scale": new}

    batch = zoo.dense_blocks().make_batch(4, 0)
    pipe = pdjax.Pipeline(loss_fn, optax.sgd(0.1), num_stages=2, plan=["w1"])
    with pytest.raises(ValueError, match=r"'scale' is read on stage 1 and updated on stage 0"):
        pipe.init(weights(2), batch, model_state={"scale": np.float32(1.0)})


# ---------------------------------------------------------------- side effects


@pytest.mark.parametrize("remat", ["none", "full"])
def test_callbacks_run_once_for_each_microbatch(remat):
    seen: list[float] = []
    doubled: list[int] = []

    def double(x):
        doubled.append(1)
        return np.asarray(2 * x)

    def loss_fn(p, batch, rng):
        jax.debug.callback(lambda v: seen.append(float(v)), batch["x"].sum())
        x = jnp.tanh(batch["x"] @ p["w0"])
        scale = jax.lax.stop_gradient(jnp.abs(x).mean())
        scale = jax.pure_callback(double, jax.ShapeDtypeStruct((), jnp.float32), scale)
        x = jnp.tanh(x @ p["w1"]) * scale
        jax.debug.callback(lambda v: seen.append(float(v)), x.sum())
        return jnp.mean((x @ p["w2"] - batch["y"]) ** 2)

    batch = zoo.dense_blocks().make_batch(6, 0)
    pipe = pdjax.Pipeline(loss_fn, optax.sgd(0.1), num_stages=3, num_microbatches=3, remat=remat)
    state = pipe.init(weights(3), batch)
    assert not seen
    state, _ = pipe.step(state, batch)
    pipe.params(state)
    jax.effects_barrier()
    assert len(seen) == 6
    assert len(doubled) == 3
