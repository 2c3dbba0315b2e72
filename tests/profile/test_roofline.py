"""What layers cost by calculation, and whether a profile is fit for a model and a device."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import zoo

from pdjax.errors import PdjaxWarning
from pdjax.profile.check import check_profile
from pdjax.profile.measure import measure
from pdjax.profile.profile import Profile
from pdjax.profile.rates import BYTES_EFFICIENCY, FLOPS_EFFICIENCY, Rates, find_rates
from pdjax.profile.roofline import estimate
from pdjax.trace.layers import LayerGraph, build_graph, model_fingerprint

KEY = jax.random.key(0)


def graph_of(case: zoo.Case, batch_size: int = 2) -> LayerGraph:
    return zoo.graph_of(case, batch_size, KEY)


# ---------------------------------------------------------------- figures


def dense_of(width: int, num_rows: int) -> LayerGraph:
    shape = jax.ShapeDtypeStruct((width, width), jnp.float32)
    params = {f"w{i}": shape for i in range(4)}

    def loss_fn(p, x, rng):
        for i in range(4):
            x = x @ p[f"w{i}"]
        return jnp.mean(x**2)

    rows = jax.ShapeDtypeStruct((num_rows, width), jnp.float32)
    return build_graph(loss_fn, params, rows, KEY)


def test_an_analytic_profile_takes_no_memory_and_compiles_nothing(compilations):
    """Weights of 4 TB each."""
    profile = estimate(dense_of(1_000_000, 16), Rates(1e15, 1e12), batch_size=16)
    assert profile.source == "analytic"
    assert profile.layers[1].flops == 2 * 16 * 1e12
    assert profile.layers[1].param_bytes == 4e12
    assert compilations == []


def test_a_pass_takes_as_long_as_its_flops_or_its_bytes():
    width, rows = 64, 8
    flops = 2.0 * rows * width**2
    fast_memory = estimate(dense_of(width, rows), Rates(1e3, 1e20), batch_size=rows).layers
    assert [layer.forward_s for layer in fast_memory][:3] == [flops / 1e3] * 3
    # the gradients of weights and of inputs, but of weights alone in the first layer
    assert fast_memory[0].backward_s == pytest.approx(flops / 1e3, rel=0.2)
    assert fast_memory[1].backward_s == pytest.approx(2 * flops / 1e3, rel=0.2)
    slow_memory = estimate(dense_of(width, rows), Rates(1e20, 1e3), batch_size=rows).layers
    weights, values = 4 * width**2, 4 * rows * width
    assert slow_memory[1].forward_s >= (weights + 2 * values) / 1e3
    assert slow_memory[1].forward_s <= (weights + 3 * values) / 1e3  # the input is stored as well
    assert slow_memory[1].backward_s == pytest.approx((2 * weights + 3 * values) / 1e3)


def test_a_table_is_read_where_it_is_looked_up():
    def loss_fn(p, tokens, rng):
        return jnp.mean((p["table"][tokens] @ p["head"]) ** 2)

    params = {"table": jnp.ones((1000, 4)), "head": jnp.ones((4, 1))}
    graph = build_graph(loss_fn, params, jnp.ones((3,), jnp.int32), KEY)
    embed = estimate(graph, Rates(1e20, 1.0), batch_size=3).layers[0]
    assert embed.forward_s < 4 * 1000  # bytes: of three rows and their copy, not of the table
    assert embed.backward_s >= 4 * 4 * 1000  # its gradient is a whole table


def test_every_parameter_is_counted_once():
    """The table of positions, of which only the first rows are used, too."""
    case = zoo.transformer()
    graph = graph_of(case)
    profile = estimate(graph, Rates(1e9, 1e9, ""), batch_size=2)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(case.params))
    assert profile.total("param_bytes") == total
    assert sum(layer.param_bytes for layer in graph.layers) < total


# ---------------------------------------------------------------- rates


def test_rates_by_name_and_by_figures():
    v100 = find_rates("V100")
    assert v100.name == "v100"
    assert v100.flops_per_s == 15.7e12 * FLOPS_EFFICIENCY
    assert v100.bytes_per_s == 900e9 * BYTES_EFFICIENCY
    assert find_rates("15TFLOP/s,900GB/s") == Rates(15e12, 900e9)
    assert find_rates(" 1.5e3GFLOP/s, 2MB/s ") == Rates(1.5e12, 2e6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v10", "unknown rates 'v10', did you mean 'v100'"),
        ("15TFLOP/s", "a form like '15TFLOP/s,900GB/s'"),
        ("15,900", "a form like"),
        ("1.2.3TFLOP/s,900GB/s", "is no number"),
        ("0TFLOP/s,900GB/s", "flops_per_s is 0.0; expected a positive"),
        ("1TFLOP/s,0GB/s", "bytes_per_s is 0.0; expected a positive"),
    ],
)
def test_what_are_no_rates(text, message):
    with pytest.raises(ValueError, match=message):
        find_rates(text)


@pytest.mark.parametrize("figure", [-1.0, float("nan"), float("inf")])
def test_rates_that_make_no_sense(figure):
    with pytest.raises(ValueError, match="flops_per_s is"):
        Rates(figure, 1.0)
    with pytest.raises(ValueError, match="bytes_per_s is"):
        Rates(1.0, figure)


# ---------------------------------------------------------------- fit for use


def refused(profile: Profile, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        check_profile(profile, graph_of(zoo.dense_blocks(3)), **{"batch_size": 2, **options})


def test_a_profile_of_another_model_is_refused():
    profile = estimate(graph_of(zoo.dense_blocks(4)), find_rates("cpu"), batch_size=2)
    refused(profile, r"has 4 layers, this model 3; differing: \['block_3'\]. Profile this model")
    profile = estimate(graph_of(zoo.dense_blocks(3, width=8)), find_rates("cpu"), batch_size=2)
    refused(profile, "its fingerprint is .*other parameters or sizes")


def test_a_profile_of_another_device_is_refused():
    graph = graph_of(zoo.dense_blocks(3))
    profile = dataclasses.replace(measure(graph, batch_size=2, repeats=1), device="TPU v4")
    cpu = jax.devices()[0]
    refused(profile, r"kind 'TPU v4', and this one is of the kind 'cpu'.*Measure on", device=cpu)
    assert check_profile(profile, graph, batch_size=2) is profile
    unknown = dataclasses.replace(profile, device="")
    assert check_profile(unknown, graph, batch_size=2, device=cpu) is unknown


def test_an_analytic_profile_is_for_devices_that_its_rates_name():
    graph = graph_of(zoo.dense_blocks(3))
    device: Any = type("Fake", (), {"device_kind": "NVIDIA A100-SXM4-80GB", "id": 0})()
    placement: Any = type("Placement", (jax.sharding.Sharding,), {"device_set": {device}})
    placement = placement.__new__(placement)
    for name in ("a100", "a100-bf16", "1TFLOP/s,1GB/s"):
        profile = estimate(graph, find_rates(name), batch_size=2)
        assert check_profile(profile, graph, batch_size=2, device=placement) is profile
    profile = estimate(graph, find_rates("v100"), batch_size=2)
    with pytest.raises(ValueError, match="kind 'v100', and this one is of the kind 'NVIDIA A100"):
        check_profile(profile, graph, batch_size=2, device=placement)


def test_a_profile_for_another_batch_size_is_scaled_with_a_warning():
    graph = graph_of(zoo.dense_blocks(3))
    profile = estimate(graph, find_rates("v100"), batch_size=8)
    with pytest.warns(PdjaxWarning, match="scaled by 2/8"):
        scaled = check_profile(profile, graph, batch_size=2)
    assert scaled.batch_size == 2
    assert scaled.total("forward_s") == pytest.approx(profile.total("forward_s") / 4)
    refused(dataclasses.replace(profile, batch_size=None), "does not say for which batch size")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_profile(profile, graph, batch_size=8)


def test_the_fingerprint_is_of_the_model_alone():
    same = {model_fingerprint(graph_of(zoo.dense_blocks(3), size)) for size in (1, 2, 7)}
    assert len(same) == 1
    others = [
        zoo.dense_blocks(4),
        zoo.dense_blocks(3, width=8),
        zoo.dense_blocks(3, tied=True),
    ]
    for other in others:
        assert model_fingerprint(graph_of(other)) not in same
