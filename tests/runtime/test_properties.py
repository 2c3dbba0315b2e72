"""Random models, cut at random places, into random numbers of microbatches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pdjax
from pdjax.split.differentiate import StagePrograms, differentiate
from pdjax.split.stages import StageSplit, split
from pdjax.trace.layers import LayerGraph, build_graph

KEY = jax.random.key(2)
SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer of a random model.

    Attributes:
        width: number of its outputs.
        source: which of the earlier values it reads, counted from the newest.
        skip: which earlier value is added, if it has the same width.
        weights: how many layers back the layer stands whose weights it shares, if that fits.
        kind: what it does besides the product.
    """

    width: int
    source: int
    skip: int
    weights: int
    kind: str


layer_specs = st.lists(
    st.builds(
        LayerSpec,
        width=st.sampled_from([2, 3]),
        source=st.sampled_from([0, 0, 0, 1, 2]),
        skip=st.integers(0, 3),
        weights=st.sampled_from([0, 0, 1, 2]),
        kind=st.sampled_from(["tanh", "norm", "choice", "dropout", "frozen", "state"]),
    ),
    min_size=2,
    max_size=5,
)


def random_model(specs: list[LayerSpec]) -> zoo.Case:
    """A loss over the given layers, with shared weights, skips, integers and masks."""
    widths, owner = [3], []
    for at, spec in enumerate(specs):
        fan_in = widths[-1 - min(spec.source, at)]
        shape, chosen = (fan_in, spec.width), at
        if spec.weights and at >= spec.weights and owner[at - spec.weights][1] == shape:
            chosen = owner[at - spec.weights][0]
        owner.append((chosen, shape))
        widths.append(spec.width)
    rng = np.random.default_rng(0)
    params = {
        f"layer_{at}": {
            "w": rng.normal(size=shape).astype(np.float32),
            "b": rng.normal(size=shape[1:]).astype(np.float32),
        }
        for at, (_, shape) in enumerate(owner)
    }

    def loss_fn(params: Any, batch: Any, rng: Any) -> Any:
        values, penalty = [batch["x"]], 0.0
        for at, spec in enumerate(specs):
            p = params[f"layer_{owner[at][0]}"]
            y = values[-1 - min(spec.source, at)] @ p["w"] + p["b"]
            y = _apply(spec.kind, y, p, jax.random.fold_in(rng, at))
            other = values[-1 - min(spec.skip, at)]
            values.append(y + other if spec.skip and other.shape == y.shape else y)
            penalty = penalty + 0.01 * jnp.sum(p["w"] ** 2)
        error = values[-1].mean(-1) - batch["y"]
        return jnp.mean(error**2) + penalty

    def make_batch(size: int, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(size, 3)).astype(np.float32)
        return {"x": x, "y": rng.normal(size=size).astype(np.float32)}

    return zoo.Case(loss_fn, params, None, make_batch)


def _apply(kind: str, y: Any, p: Any, key: Any) -> Any:
    if kind == "norm":
        return (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(jnp.var(y, -1, keepdims=True) + 1)
    if kind == "choice":
        return jnp.where(y > 0, y, 0.1 * y) + jax.nn.one_hot(jnp.argmax(y, -1), y.shape[-1])
    if kind == "dropout":
        return jnp.where(jax.random.bernoulli(key, 0.7, y.shape), y, 0.0)
    if kind == "frozen":
        return jnp.tanh(y) * jax.lax.stop_gradient(jnp.linalg.norm(p["w"]))
    if kind == "state":
        return jnp.tanh(y * p["b"].astype(jnp.bfloat16).astype(jnp.float32))
    return jnp.tanh(y)


def every_equation_a_layer(graph: LayerGraph) -> LayerGraph:
    first = graph.layers[0]
    layers = tuple(
        dataclasses.replace(first, name=f"equation_{at}", start=at, stop=at + 1)
        for at in range(len(graph.line))
    )
    return dataclasses.replace(graph, layers=layers)


def run_by_hand(
    stages: StageSplit, programs: Sequence[StagePrograms], params: Any, batch: Any
) -> Any:
    """Forward through all stages, then backward: the loss and the gradient leaves."""
    leaves, batch_leaves = jax.tree.leaves(params), jax.tree.leaves(batch)
    consts = stages.traced.program.consts
    sent: dict[Any, Any] = {}
    kept, loss = [], None
    for program in programs:
        stage, inputs = program.stage, program.inputs
        values = dict(zip(inputs["params"], (leaves[i] for i in stage.params), strict=True))
        values |= zip(inputs["consts"], (consts[i] for i in stage.consts), strict=True)
        values |= zip(inputs["batch"], (batch_leaves[i] for i in stage.batch), strict=True)
        values |= zip(inputs["key"], [KEY] * stage.uses_key, strict=True)
        received = zip(inputs["receives"], (sent[var] for var in stage.receives), strict=True)
        made = program.forward.run({**values, **dict(received)})
        sent |= zip(stage.sends, made["sends"], strict=True)
        loss = made["results"][0] if stage.outputs else loss
        kept.append((values, made["saved"]))
    gradients: list[Any] = [0.0] * len(leaves)
    back: dict[Any, Any] = {}
    for program, (values, saved) in zip(reversed(programs), reversed(kept), strict=True):
        values |= zip(program.forward.outputs["saved"], saved, strict=True)
        wanted = (back[program.stage.sends[at]] for at in program.gradient_sends)
        values |= zip(program.cotangents, wanted, strict=True)
        if program.seed is not None:
            values[program.seed] = jnp.ones(())
        made = program.backward.run(values)
        for index, gradient in zip(program.stage.params, made["params"], strict=True):
            gradients[index] = gradients[index] + gradient
        for at, cotangent in zip(program.gradient_receives, made["receives"], strict=True):
            var = program.stage.receives[at]
            back[var] = back[var] + cotangent if var in back else cotangent
    return loss, gradients


@SLOW
@given(layer_specs, st.data())
def test_any_cut_between_any_two_equations(specs, data):
    case = random_model(specs)
    batch = case.make_batch(2, 0)
    graph = every_equation_a_layer(build_graph(case.loss_fn, case.params, batch, KEY))
    places = st.lists(st.integers(1, len(graph.line) - 1), unique=True, max_size=4)
    remat = data.draw(st.sampled_from(["none", "full"]))
    stages = split(graph, (0, *sorted(data.draw(places))))
    programs = differentiate(stages, [remat] * len(stages.stages))
    loss, gradients = run_by_hand(stages, programs, case.params, batch)
    expected, expected_gradients = jax.value_and_grad(case.loss_fn)(case.params, batch, KEY)
    chex.assert_trees_all_close(loss, expected, rtol=1e-5)
    chex.assert_trees_all_close(
        gradients, jax.tree.leaves(expected_gradients), atol=2e-5, rtol=1e-4
    )


@settings(parent=SLOW, max_examples=12)
@given(
    layer_specs,
    st.sampled_from(["model_parallel", "gpipe", "one_f_one_b"]),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_any_schedule_of_any_model(specs, schedule, num_stages, num_microbatches):
    case = random_model(specs)
    batches = [case.make_batch(2 * num_microbatches, seed) for seed in range(2)]
    num_layers = len(build_graph(case.loss_fn, case.params, batches[0], KEY).layers)
    pipe = pdjax.Pipeline(
        case.loss_fn,
        optax.sgd(0.1),
        schedule=schedule,
        num_stages=min(num_stages, num_layers),
        num_microbatches=num_microbatches,
    )
    state = pipe.init(case.params, batches[0], rng=KEY)
    for batch in batches:
        state, _ = pipe.step(state, batch)
    params, _, _ = oracle.replay_synchronous(
        case.loss_fn, optax.sgd(0.1), case.params, batches, num_microbatches, KEY
    )
    chex.assert_trees_all_close(pipe.params(state), params, atol=2e-5, rtol=1e-4)
