"""What is timed, how often, with which inputs, and for which models. No test looks at a clock."""

from __future__ import annotations

import dataclasses
import io
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from rich.console import Console

from pdjax.errors import PdjaxWarning
from pdjax.profile import measure as profiler
from pdjax.profile import progress as progress_bar
from pdjax.profile import stage_timer, timing
from pdjax.profile.check import check_profile
from pdjax.profile.finest_cut import finest_cut
from pdjax.profile.measure import measure
from pdjax.profile.profile import Profile
from pdjax.profile.rates import find_rates
from pdjax.profile.roofline import estimate
from pdjax.split.differentiate import differentiate, differentiate_alone
from pdjax.split.stages import split
from pdjax.trace import jaxprs
from pdjax.trace.layers import LayerGraph, build_graph, model_fingerprint

KEY = jax.random.key(0)
QUICK_KEY = jax.random.key(0, impl="unsafe_rbg")  # its random bits are quick to compile
WIDTH = 4


def graph_of(case: zoo.Case, batch_size: int = 2, rng: Any = KEY) -> LayerGraph:
    return zoo.graph_of(case, batch_size, rng)


def functional(loss_fn: Any, num_weights: int = 4, **options: Any) -> LayerGraph:
    params = {f"w{i}": jnp.ones((WIDTH, WIDTH)) for i in range(num_weights)}
    return build_graph(loss_fn, params, jnp.ones((2, WIDTH)), KEY, **options)


def chain(p: Any, x: Any, rng: Any) -> Any:
    for i in range(len(p)):
        x = jnp.tanh(x @ p[f"w{i}"])
    return jnp.mean(x**2)


def quick(graph: LayerGraph, **options: Any) -> Profile:
    return measure(graph, **{"batch_size": 2, "repeats": 1, **options})


# ---------------------------------------------------------------- equal layers


@pytest.mark.parametrize("num_blocks", [4, 12])
def test_equal_layers_are_derived_and_compiled_once(num_blocks, compilations, monkeypatch):
    """The first block has no input to differentiate by, the last one makes the loss."""
    derived = []
    monkeypatch.setattr(
        stage_timer,
        "differentiate_alone",
        lambda split, stage: derived.append(stage.index) or differentiate_alone(split, stage),
    )
    graph = functional(chain, num_blocks)
    compilations.clear()
    profile = quick(graph)
    assert len(profile.layers) == num_blocks
    assert derived == [0, 1, num_blocks - 1]
    assert len(compilations) == 2 * 3 + 1  # and the program that does nothing


def test_equal_layers_of_a_transformer_share_their_figures():
    """Dropout's random bits differ from block to block in their seed alone."""
    graph = graph_of(zoo.transformer(dropout=0.1), rng=QUICK_KEY)
    layers = {layer.name: layer for layer in quick(graph).layers}
    for name in ("attention/out", "mlp_in", "mlp_out", "norm_mlp"):
        one, other = layers[f"block_0/{name}"], layers[f"block_1/{name}"]
        assert dataclasses.replace(one, name=other.name, cut_bytes=other.cut_bytes) == other
    assert layers["block_0/mlp_in"].flops != layers["head"].flops


def stopped(p: Any, x: Any, rng: Any) -> Any:
    """No gradient passes from the third layer to the second."""
    for i in range(6):
        x = jnp.tanh(x @ p[f"w{i}"])
        x = jax.lax.stop_gradient(x) if i == 1 else x
    return jnp.mean(x**2)


def test_layers_of_equal_equations_but_other_gradients_are_not_alike():
    cut = finest_cut(functional(stopped, 6))
    assert cut.alike == (0, 1, 2, 3, 3, 4)


def test_layers_of_equal_equations_that_send_other_shapes_are_not_alike():
    def loss_fn(p, x, rng):
        total = 0.0
        for i in range(5):
            y = jnp.tanh(x @ p[f"w{i}"])
            summed = jnp.sum(y)
            total = summed if i == 1 else total  # only the sum of the second layer goes on
            x = x if i == 1 else y
        return total + jnp.mean(x**2)

    graph = functional(loss_fn, 5)
    assert len({layer.fingerprint for layer in graph.layers[:4]}) == 1
    assert finest_cut(graph).alike == (0, 1, 2, 2, 3)


def test_layers_of_equal_equations_that_send_more_are_not_alike():
    def loss_fn(p, x, rng):
        early = None
        for i in range(4):
            product = x @ p[f"w{i}"]
            early = product if i == 1 else early
            x = jnp.tanh(product)
        return jnp.mean((x @ p["w4"] + early) ** 2)

    graph = functional(loss_fn, 5)
    assert len({layer.fingerprint for layer in graph.layers[:4]}) == 1
    assert finest_cut(graph).alike == (0, 1, 2, 2, 3)


# ---------------------------------------------------------------- figures


def test_the_profile_says_what_it_is_of():
    graph = graph_of(zoo.dense_blocks(3))
    profile = quick(graph, device=jax.devices()[1], repeats=3)
    assert profile.names == graph.names
    assert profile.column("cut_bytes") == [layer.cut_bytes for layer in graph.layers]
    assert profile.column("param_bytes") == [layer.param_bytes for layer in graph.layers]
    assert profile.batch_size == 2
    assert profile.device == jax.devices()[1].device_kind
    assert profile.model == model_fingerprint(graph)
    assert profile.jax_version == jax.__version__
    assert profile.source == "measured"
    assert profile.dtype == "float32"
    assert profile.total("flops") > 0
    assert Profile.from_json(profile.to_json()) == profile


def stored_in_a_pipeline(graph: LayerGraph) -> list[int]:
    """Stash bytes of a pipeline of single layers, whose stages get the same cotangents as alone."""
    stages = split(graph, range(len(graph.layers)))
    together = differentiate(stages, ("none",) * len(stages.stages))
    for stage, expected in zip(stages.stages, together, strict=True):
        alone = differentiate_alone(stages, stage)
        assert alone.gradient_sends == expected.gradient_sends
        assert alone.gradient_receives == expected.gradient_receives
    return [programs.saved_bytes for programs in together]


def test_what_is_stored_is_what_a_pipeline_of_single_layers_stores():
    for graph in (graph_of(zoo.dense_blocks(4, skip=True)), functional(stopped, 6)):
        assert quick(graph).column("stash_bytes") == stored_in_a_pipeline(graph)


def test_flops_are_xlas_count_or_ours_where_it_misses_some(monkeypatch):
    graph = graph_of(zoo.dense_blocks(3))
    for found, expected in [
        ({"flops": 1e6}, [1e6] * 3),
        ([{"flops": 1e6}], [1e6] * 3),
        ([], [layer.flops for layer in graph.layers]),
        (None, [layer.flops for layer in graph.layers]),
        ({"flops": -1.0}, [layer.flops for layer in graph.layers]),
    ]:
        compiled = jax.jit(lambda: ()).lower().compile()
        monkeypatch.setattr(type(compiled), "cost_analysis", lambda _, found=found: found)
        assert quick(graph).column("flops") == expected


def test_seconds_are_medians_without_the_dispatch(monkeypatch):
    samples = np.array([[2.0, 3.0], [4.0, 5.0], [9.0, 0.25], [3.0, 4.0], [1.0, 0.25]])
    monkeypatch.setattr(stage_timer, "sample", lambda calls, repeats: samples)
    monkeypatch.setattr(profiler, "dispatch_s", lambda placement, repeats: 0.5)
    layer = quick(graph_of(zoo.dense_blocks(3))).layers[1]
    assert (layer.forward_s, layer.backward_s) == (2.5, 2.5)
    assert layer.spread_s == (9.0 - 5.0) / 2  # quartiles of 5, 9, 9.25, 7, 1.25


def test_seconds_are_never_negative(monkeypatch):
    monkeypatch.setattr(profiler, "dispatch_s", lambda placement, repeats: 1e9)
    profile = quick(graph_of(zoo.dense_blocks(3)))
    assert {*profile.column("forward_s"), *profile.column("backward_s")} == {0.0}


def test_a_sample_is_of_as_many_calls_as_fill_some_time(monkeypatch):
    """The clock is made up: it goes on by what each call says."""
    now = [0.0]
    log = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        log.append(name)
        now[0] += seconds

    quarter, long = timing._SAMPLE_S / 4, timing._SAMPLE_S * 2
    seconds = timing.sample([lambda: call("q", quarter), lambda: call("l", long)], repeats=2)
    np.testing.assert_allclose(seconds, [[quarter, long]] * 2)
    warm_up = "qq" + "ll"  # once for what is late the first time, once to see how long it takes
    assert "".join(log) == warm_up + "qqqql" * 2


# ---------------------------------------------------------------- inputs


@pytest.fixture
def inputs(monkeypatch):
    """Collects the inputs that the passes are given: (programs, values)."""
    collected = []

    def make_inputs(programs, *args):
        values = timing.make_inputs(programs, *args)
        collected.append((programs, dict(values)))
        return values

    monkeypatch.setattr(stage_timer, "make_inputs", make_inputs)
    return collected


def test_inputs_are_made_up_in_place(inputs):
    device = jax.devices()[2]
    graph = graph_of(zoo.transformer(dropout=0.1, dtype=jnp.bfloat16), rng=QUICK_KEY)
    quick(graph, device=device)
    assert inputs
    seen = set()
    for programs, values in inputs:
        for var, value in values.items():
            assert (value.shape, value.dtype) == (jaxprs.aval(var).shape, jaxprs.aval(var).dtype)
            assert value.devices() == {device}
            seen.add(str(value.dtype))
            if jnp.issubdtype(value.dtype, jnp.integer):
                assert not value.any()
            elif jnp.issubdtype(value.dtype, jnp.inexact) and var is not programs.seed:
                assert 0 < np.abs(np.asarray(value, np.float32)).max() < 1
        if programs.seed is not None:
            assert values[programs.seed] == 1
    assert {"int32", "float32", "bfloat16", "key<urbg>"} <= seen


def test_a_batch_and_what_the_loss_function_closes_over_are_used_as_they_are(inputs):
    table = jnp.arange(8.0).reshape(2, WIDTH)

    def loss_fn(p, x, rng):
        y = jnp.tanh((x + table) @ p["w0"])
        return jnp.mean((y @ p["w1"] - x) ** 2)

    graph = functional(loss_fn, 2)
    batch = np.full((2, WIDTH), 7.0, np.float32)
    quick(graph, batch=batch)
    for programs, values in inputs:
        (var,) = programs.inputs["batch"]
        np.testing.assert_array_equal(values[var], batch)
    programs, values = inputs[0]
    np.testing.assert_array_equal(values[programs.inputs["consts"][0]], table)


# ---------------------------------------------------------------- models


class BatchNormTower(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for _ in range(3):
            x = nn.tanh(nn.BatchNorm(use_running_average=not train)(nn.Dense(WIDTH)(x)))
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        return x + nn.tanh(nn.Dense(WIDTH)(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(WIDTH)(blocks()(x, None)[0])


class Checkpointed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x, _ = nn.remat(Block)()(x, None)
        return x


def linen(model: nn.Module) -> LayerGraph:
    x = jnp.ones((2, WIDTH))
    params = jax.eval_shape(model.init, KEY, x)

    def loss_fn(p: Any, x: Any, rng: Any) -> Any:
        y: Any = model.apply(p, x)
        return jnp.mean(y**2)

    return build_graph(loss_fn, params, x, KEY)


def batch_norm(*, train: bool) -> LayerGraph:
    model, x = BatchNormTower(), jnp.ones((2, WIDTH))
    variables = jax.eval_shape(lambda: model.init(KEY, x, train=True))

    def loss_fn(params, state, x, rng):
        variables = {"params": params, "batch_stats": state}
        y, new = model.apply(variables, x, train=train, mutable=["batch_stats"])
        return jnp.mean(y**2), new["batch_stats"]

    state = variables["batch_stats"]
    return build_graph(loss_fn, variables["params"], x, KEY, model_state=state)


def scanned() -> LayerGraph:
    with pytest.warns(PdjaxWarning, match="lax.scan"):
        return linen(Scanned())


def weighted() -> LayerGraph:
    def loss_fn(p, x, rng):
        y = jnp.tanh(x @ p["w0"]) @ p["w1"]
        return jnp.sum(y**2), jnp.sum(x > 0)

    return functional(loss_fn, 2, weighted_loss=True)


def with_key_batch() -> LayerGraph:
    def loss_fn(p, batch, rng):
        noise = jax.random.normal(batch["key"], (2, WIDTH))
        return jnp.mean((batch["x"] @ p["w0"] + noise) ** 2 @ p["w1"])

    batch = {"x": jnp.ones((2, WIDTH)), "key": KEY}
    params = {name: jnp.ones((WIDTH, WIDTH)) for name in ("w0", "w1")}
    return build_graph(loss_fn, params, batch, KEY)


GRAPHS = {
    "batch norm": lambda: batch_norm(train=True),
    "batch norm, not training": lambda: batch_norm(train=False),
    "skip, L2 and bf16": lambda: graph_of(zoo.dense_blocks(4, skip=True, l2=0.1, bf16=True)),
    "dropout": lambda: graph_of(zoo.dense_blocks(3, dropout=0.5)),
    "tied": lambda: graph_of(zoo.transformer(tie_embeddings=True)),
    "remat": lambda: linen(Checkpointed()),
    "scan": scanned,
    "weighted loss": weighted,
    "key in the batch": with_key_batch,
}


@pytest.mark.parametrize("name", GRAPHS)
def test_models_of_every_kind(name):
    graph = GRAPHS[name]()
    profile = quick(graph)
    assert profile.names == graph.names
    assert check_profile(profile, graph, batch_size=2, device=jax.devices()[0]) is profile
    analytic = estimate(graph, find_rates("a100"), batch_size=2)
    assert analytic.names == graph.names
    assert analytic.column("stash_bytes") == profile.column("stash_bytes")
    assert min(analytic.column("forward_s")) > 0


def late_update(on_path: bool) -> LayerGraph:
    """A state that the second layer reads, made anew of what the fourth one makes."""

    def loss_fn(p, state, x, rng):
        x = jnp.tanh(x @ p["w0"])
        x = jnp.tanh((x / state) @ p["w1"])
        x = jnp.tanh(x @ p["w2"])
        x = jnp.tanh(x @ p["w3"])
        new = state * 0.5 + jnp.max(x)
        return jnp.mean(((x + new if on_path else x) @ p["w4"]) ** 2), new

    return functional(loss_fn, 5, model_state=jnp.ones(()))


@pytest.mark.parametrize("on_path", [True, False])
def test_layers_that_share_a_state_are_timed_together(on_path):
    graph = late_update(on_path)
    cut = finest_cut(graph)
    groups = [[layer.name for layer in layers] for layers in cut.layers]
    assert groups in ([["w0", "w1", "w2", "w3"], ["w4"]], [["w0"], ["w1", "w2", "w3"], ["w4"]])
    profile = quick(graph)
    assert profile.names == ("w0", "w1", "w2", "w3", "w4")
    members = [layer for layers in cut.layers if len(layers) > 1 for layer in layers]
    found = {layer.name: layer for layer in profile.layers}
    for one, other in itertools.pairwise(members):
        ratio = one.flops / other.flops
        for field in ("forward_s", "backward_s", "flops", "spread_s"):
            ours, theirs = getattr(found[one.name], field), getattr(found[other.name], field)
            assert ours == pytest.approx(ratio * theirs)


def test_prints_and_callbacks_are_not_run(capfd):
    called = []

    def loss_fn(p, x, rng):
        for i in range(3):
            x = jnp.tanh(x @ p[f"w{i}"])
            jax.debug.print("here {}", x.sum())
            jax.debug.callback(called.append, x)
        return jnp.mean(x**2)

    quick(functional(loss_fn, 3))
    jax.effects_barrier()
    assert capfd.readouterr() == ("", "")
    assert called == []


def test_an_error_names_the_layer():
    def fail(x):
        raise MemoryError("no room")

    def loss_fn(p, x, rng):
        x = x @ p["w0"]
        shape = jax.ShapeDtypeStruct((2, WIDTH), jnp.float32)
        x = x + jax.pure_callback(fail, shape, jax.lax.stop_gradient(x @ p["w1"]))
        return jnp.mean((x @ p["w2"]) ** 2)

    graph = functional(loss_fn, 3)
    with pytest.raises(RuntimeError, match=r"layer 'w\d' could not be measured.*smaller micro"):
        quick(graph)
    jax.clear_caches()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"repeats": 0}, "repeats is 0"),
        ({"batch": {"x": np.ones((2, 9), np.float32)}}, "the batch has leaves .*2, 9"),
    ],
)
def test_arguments_that_make_no_sense(options, message, compilations):
    graph = graph_of(zoo.dense_blocks(3))
    compilations.clear()
    with pytest.raises(ValueError, match=message):
        quick(graph, **options)
    assert compilations == []


# ---------------------------------------------------------------- progress


def test_nothing_is_printed_where_there_is_no_terminal(capfd):
    quick(graph_of(zoo.dense_blocks(3)), progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_on_a_terminal_if_it_is_wanted(progress, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(
        progress_bar, "Console", lambda **_: Console(file=terminal, force_terminal=True)
    )
    quick(graph_of(zoo.dense_blocks(3)), progress=progress)
    assert ("7/7" in terminal.getvalue()) == progress


def test_a_function_is_told_how_far_it_is():
    told = []
    quick(graph_of(zoo.dense_blocks(3)), progress=lambda *args: told.append(args))
    assert [done for _, done, _ in told] == list(range(8))
    assert {count for _, _, count in told} == {7}
    assert [what for what, _, _ in told][:3] == ["block_0", "block_1", "block_2"]
    assert told[-1] == ("done", 7, 7)
