"""A backward pass in two parts computes what it computes as a whole."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_features
import zoo
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding
from test_input_weight import FAST_KEY, RECTANGLE, STACKED, assert_disjoint, scanned, stages_of
from test_properties import (
    KEY,
    SLOW,
    every_equation_a_layer,
    layer_specs,
    random_model,
    run_by_hand,
)

from pdjax.runtime.inputs import Given, Reads, restricted
from pdjax.runtime.stage import StageRunner
from pdjax.split.differentiate import StagePrograms, differentiate
from pdjax.split.input_weight import split_input_weight
from pdjax.split.stages import StageSplit, split
from pdjax.trace import jaxprs
from pdjax.trace.layers import build_graph

# ---------------------------------------------------------------- the two programs


class InTwoParts:
    """Runs a backward pass in its two parts, the second on what it may read only."""

    def __init__(self, programs: StagePrograms) -> None:
        self.parts = split_input_weight(programs)
        assert_disjoint(programs, self.parts)
        saved = programs.forward.outputs["saved"]
        hidden = {*programs.cotangents, *saved} - {saved[at] for at in self.parts.kept}
        self.hidden = hidden

    def run(self, values: dict[Any, Any]) -> dict[str, tuple[Any, ...]]:
        first = self.parts.input_part.run(values)
        left = {var: value for var, value in values.items() if var not in self.hidden}
        left |= zip(self.parts.input_part.outputs["held"], first["held"], strict=True)
        second = self.parts.weight_part.run(left)
        gradients = dict(zip(self.parts.early, first["params"], strict=True))
        gradients |= zip(self.parts.late, second["params"], strict=True)
        params = tuple(gradients[at] for at in range(len(gradients)))
        return {"params": params, "receives": first["receives"]}


@SLOW
@given(layer_specs, st.data())
def test_gradients_of_any_model_cut_anywhere(specs, data):
    case = random_model(specs)
    batch = case.make_batch(2, 0)
    graph = every_equation_a_layer(build_graph(case.loss_fn, case.params, batch, KEY))
    places = st.lists(st.integers(1, len(graph.line) - 1), unique=True, max_size=4)
    remat = data.draw(st.sampled_from(["none", "full"]))
    stages = split(graph, (0, *sorted(data.draw(places))))
    programs = differentiate(stages, [remat] * len(stages.stages))
    divided: Any = [dataclasses.replace(p, backward=InTwoParts(p)) for p in programs]
    _, gradients = run_by_hand(stages, divided, case.params, batch)
    expected = jax.tree.leaves(jax.grad(case.loss_fn)(case.params, batch, KEY))
    chex.assert_trees_all_close(gradients, expected, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------- the compiled stages


def constants_in_jit_in_checkpoint() -> zoo.Case:
    table = np.arange(16, dtype=np.float32).reshape(4, 4) / 16
    nested = jax.jit(lambda x: jnp.tanh(x @ table))

    def loss_fn(p, batch, rng):
        x = batch["x"]
        for i in range(5):
            x = jax.checkpoint(lambda w, x: nested(jnp.tanh(x @ w)))(p[f"w{i}"], x)
        return jnp.mean((x - batch["y"]) ** 2)

    return test_features.functional(loss_fn, **test_features.weights(5))


CASES = {
    "tied": lambda: zoo.dense_blocks(tied=True, skip=True, l2=0.1),
    "bf16": lambda: zoo.dense_blocks(bf16=True, dropout=0.3),
    "skip": test_features.skip_over_stages,
    "used twice": test_features.value_used_twice,
    "nested jit": test_features.nested_jit,
    "custom_vjp": test_features.custom_vjp,
    "integers": test_features.integers_cross,
    "constants": constants_in_jit_in_checkpoint,
}


class Line:
    """The compiled stages of a model, each on a device of its own, run by hand."""

    def __init__(self, stages: StageSplit, programs: Sequence[StagePrograms]) -> None:
        update: Any = types.SimpleNamespace(donates_weights=False)
        places = [SingleDeviceSharding(device) for device in jax.devices()]
        self.stages, self.programs = stages, programs
        self.runners = [
            StageRunner(program, place, update)
            for program, place in zip(programs, places, strict=False)
        ]

    def inputs(self, case: zoo.Case, batch: Any, number: int) -> Iterator[tuple[Any, Given]]:
        leaves = [
            list(map(jnp.asarray, jax.tree.leaves(tree)))
            for tree in (case.params, case.model_state, batch)
        ]
        consts = self.stages.traced.program.consts
        for stage in self.stages.stages:
            groups = ((leaves[0], stage.params), (leaves[1], stage.state), (leaves[2], stage.batch))
            params, state, batch_leaves = (tuple(v[i] for i in at) for v, at in groups)
            given = Given(
                tuple(consts[i] for i in stage.consts),
                state,
                batch_leaves,
                (FAST_KEY,),
                (jnp.uint32(number),),
            )
            yield params, given

    def run(self, case: zoo.Case, in_parts: bool, num_microbatches: int = 2) -> list[Any]:
        """The gradients of each stage, and the cotangents that it sends, over microbatches.

        In parts, all input parts run before the first weight part does.
        """
        gradients: list[Any] = [None] * len(self.runners)
        everything, waiting = [], []
        for number in range(num_microbatches):
            inputs = list(self.inputs(case, case.make_batch(zoo.MICROBATCH, number), number))
            saved = self.forward(inputs)
            back: dict[Any, list[Any]] = {}
            for at in reversed(range(len(self.runners))):
                runner, programs = self.runners[at], self.programs[at]
                params, groups = inputs[at]
                reads: Reads = runner.backward_reads
                came = [back[programs.stage.sends[i]] for i in programs.gradient_sends]
                arguments = (
                    *(params, restricted(groups, reads), saved[at]),
                    tuple(tuple(reversed(parts)) for parts in came),
                    gradients[at],
                )
                if in_parts:
                    gradients[at], sent, held = runner.divided.input_part(*arguments)
                    waiting.append((at, params, held))
                else:
                    gradients[at], sent = runner.backward(*arguments)
                for i, cotangent in zip(programs.gradient_receives, sent, strict=True):
                    back.setdefault(programs.stage.receives[i], []).append(cotangent)
                everything.append(sent)
        for at, params, held in waiting:
            gradients[at] = self.runners[at].divided.weight_part(params, held, gradients[at])
        return jax.device_get([gradients, everything])

    def forward(self, inputs: Sequence[tuple[Any, Given]]) -> list[tuple[Any, ...]]:
        """Runs all forward passes; returns what each saved."""
        sent: dict[Any, Any] = {}
        saved = []
        for runner, (params, groups) in zip(self.runners, inputs, strict=True):
            stage, index = runner.programs.stage, runner.forward_outputs
            reads = restricted(groups, runner.forward_reads)
            outputs = runner.forward(params, reads, tuple(sent[var] for var in stage.receives))
            sent |= zip(stage.sends, (outputs[i] for i in index.sends), strict=True)
            saved.append(tuple(outputs[i] for i in index.saved))
        return saved


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", CASES)
def test_two_parts_make_what_the_whole_makes(name, remat):
    compare(CASES[name](), remat, num_microbatches=2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "remat", "options"),
    [
        ("mlp", "none", {}),
        ("transformer", "none", {"dropout": 0.2}),
        ("transformer", "full", {"tie_embeddings": True}),
        ("vgg16", "full", {}),
        ("vgg16_bn", "none", {}),
    ],
)
def test_two_parts_of_the_models(name, remat, options):
    with zoo.compiled_quickly(name in zoo.LARGE):
        compare(zoo.MODELS[name](**options), remat, num_microbatches=1, atol=1e-5, rtol=1e-4)


def compare(case: zoo.Case, remat: Any, num_microbatches: int, **tolerance: float) -> None:
    batch = case.make_batch(zoo.MICROBATCH, 0)
    graph = build_graph(case.loss_fn, case.params, batch, FAST_KEY, model_state=case.model_state)
    stages = split(graph, [len(graph.layers) * i // 3 for i in range(3)])
    line = Line(stages, differentiate(stages, (remat, remat, remat)))
    whole, parts = (line.run(case, in_parts, num_microbatches) for in_parts in (False, True))
    chex.assert_trees_all_close(parts, whole, **tolerance)


def test_two_parts_make_the_same_to_the_last_bit():
    case = zoo.dense_blocks()
    batch = case.make_batch(zoo.MICROBATCH, 0)
    line = Line(*stages_of(case.loss_fn, case.params, batch, (0, 2, 4)))
    chex.assert_trees_all_equal(line.run(case, True), line.run(case, False))


def test_a_stage_that_is_not_asked_for_its_parts_is_not_divided(monkeypatch):
    case = zoo.dense_blocks()
    monkeypatch.setattr(
        "pdjax.runtime.stage_input_weight.split_input_weight",
        lambda programs: pytest.fail("divided"),
    )
    line = Line(*stages_of(case.loss_fn, case.params, case.make_batch(2, 0), (0, 2, 4)))
    line.run(case, False)


@pytest.mark.filterwarnings("ignore::pdjax.PdjaxWarning")
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("name", ["plain", "loop"])
def test_lowerings_are_all_that_is_run(name, num_microbatches, compilations):
    def loss_fn(p, batch, rng):
        return scanned()(p, batch["x"], rng)

    case = zoo.Case(loss_fn, STACKED, None, lambda size, seed: {"x": RECTANGLE})
    starts: tuple[int, ...] = (0, 1, 2)
    if name == "plain":
        case, starts = zoo.dense_blocks(dropout=0.1), (0, 2, 4)
    line = Line(*stages_of(case.loss_fn, case.params, case.make_batch(zoo.MICROBATCH, 0), starts))
    line.run(case, False, num_microbatches)
    key = jax.ShapeDtypeStruct((), FAST_KEY.dtype)
    for runner in line.runners:
        for kind in ("I", "W"):
            for lower in runner.lowerings(kind, key, num_microbatches > 1):
                lower().compile()
    compilations.clear()
    line.run(case, True, num_microbatches)
    assert compilations == []


def test_held_values_are_where_the_stage_is():
    case = zoo.dense_blocks()
    line = Line(*stages_of(case.loss_fn, case.params, case.make_batch(2, 0), (0, 2, 4)))
    inputs = list(line.inputs(case, case.make_batch(2, 0), 0))
    saved = line.forward(inputs)
    runner, (params, groups) = line.runners[1], inputs[1]
    given = restricted(groups, runner.backward_reads)
    cotangents = tuple(
        (jax.device_put(jnp.ones(jaxprs.aval(var).shape), jax.devices()[3]),)
        for var in line.programs[1].cotangents
    )
    _, _, held = runner.divided.input_part(params, given, saved[1], cotangents, None)
    assert held.values
    assert all(value.devices() == {jax.devices()[1]} for value in held.values)
    assert sum(value.nbytes for value in held.values) == runner.divided.backward.held_bytes


def test_a_cotangent_that_is_sent_and_held_is_one_array():
    def loss_fn(p, batch, rng):
        u, v = jnp.tanh(batch["x"] @ p["w0"]), jnp.tanh(batch["x"] @ p["w1"])
        return jnp.mean(jnp.tanh((u @ p["w2"] + v) @ p["w3"]) ** 2)

    case = test_features.functional(loss_fn, **test_features.weights(4))
    line = Line(*stages_of(case.loss_fn, case.params, case.make_batch(2, 0), (0, 2, 3)))
    chex.assert_trees_all_close(line.run(case, True), line.run(case, False), rtol=1e-6)
    outputs = line.programs[1].backward.outputs["receives"]
    assert len(outputs) == 2
    inputs = list(line.inputs(case, case.make_batch(2, 0), 0))
    saved = line.forward(inputs)
    given = restricted(inputs[1][1], line.runners[1].backward_reads)
    cotangents = ((jnp.ones((2, 4)),),)
    run = line.runners[1].divided.input_part
    _, sent, held = run(inputs[1][0], given, saved[1], cotangents, None)
    assert any(value is cotangent for value in held.values for cotangent in sent[1:])
