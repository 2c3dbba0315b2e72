"""A backward pass in two parts: what each computes, what waits in between, and that it is right."""

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
from test_properties import (
    KEY,
    SLOW,
    every_equation_a_layer,
    layer_specs,
    random_model,
    run_by_hand,
)

from pdjax import jaxprs
from pdjax.differentiate import StagePrograms, differentiate
from pdjax.divide import DividedBackward, divide
from pdjax.graph import build_graph
from pdjax.runtime.inputs import Given, Reads, restricted
from pdjax.runtime.stage import StageRunner
from pdjax.split import StageSplit, split

FAST_KEY = jax.random.key(2, impl="unsafe_rbg")  # compiles in a fraction of the time
WIDTH, ROWS = 32, 2
WEIGHT_BYTES = WIDTH * WIDTH * 2  # of the smallest copy of one weight there could be, in bf16
RECTANGLE = np.ones((ROWS, WIDTH), np.float32)


def weights(count=6):
    rng = np.random.default_rng(0)
    return {f"w{i}": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for i in range(count)}


def chain(layer, num_layers=6):
    """A loss over layers of one weight each."""

    def loss_fn(p, x, rng):
        for i in range(num_layers):
            x = layer(p[f"w{i}"], x, jax.random.fold_in(rng, i))
        return jnp.mean(x.astype(jnp.float32) ** 2)

    return loss_fn


def plain(w, x, key):
    return jnp.tanh(x @ w)


def middle(loss_fn, params=None, batch: Any = RECTANGLE, starts=(0, 2, 4), remat: Any = "none"):
    """The programs of the second stage."""
    return stages_of(loss_fn, params or weights(), batch, starts, remat)[1][1]


def stages_of(loss_fn, params, batch, starts, remat: Any = "none", **options):
    stages = split(build_graph(loss_fn, params, batch, FAST_KEY, **options), starts)
    return stages, differentiate(stages, [remat] * len(starts))


# ---------------------------------------------------------------- what each part computes


def products(equations: Sequence[Any]) -> int:
    """Matrix products and convolutions, those inside loops and the like included."""
    heavy = ("dot_general", "conv_general_dilated")
    return sum(
        (e.primitive.name in heavy) + sum(products(inner.eqns) for inner in jaxprs.subprograms(e))
        for e in equations
    )


def counts(programs: StagePrograms) -> tuple[int, int, int]:
    """The products of the input part, the weight part and the undivided pass."""
    parts = divide(programs)
    runs = parts.input_part, parts.weight_part, programs.backward
    return tuple(products(run.equations) for run in runs)  # pyright: ignore[reportReturnType]


def dropped_out(w, x, key):
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), jnp.tanh(x @ w), 0)


def transposed_bf16(w, x, key):
    return jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16).T)


def normalised(w, x, key):
    return jnp.tanh(x @ (w / jnp.linalg.norm(w)))


def checkpointed(w, x, key):
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x)


def twice_checkpointed(w, x, key):
    return jax.checkpoint(lambda w, x: checkpointed(w, jnp.tanh(x @ w), key))(w, x)


@jax.custom_vjp
def with_own_rule(w, x):
    return jnp.tanh(x @ w)


def _own_forward(w, x):
    y = with_own_rule(w, x)
    return y, (w, x, y)


def _own_backward(saved, g):
    w, x, y = saved
    g = 2.0 * g * (1 - y**2)
    return x.T @ g, g @ w.T


with_own_rule.defvjp(_own_forward, _own_backward)


@pytest.mark.parametrize(
    ("layer", "remat", "expected"),
    [
        (plain, "none", (2, 2, 4)),
        (plain, "full", (4, 2, 6)),  # what is computed again is computed for the input part
        (jax.jit(plain), "none", (2, 2, 4)),
        (checkpointed, "none", (4, 2, 6)),
        (checkpointed, "full", (4, 2, 7)),  # the whole pass computes the first layer twice
        (twice_checkpointed, "none", (8, 4, 12)),
        (dropped_out, "none", (2, 2, 4)),
        (transposed_bf16, "none", (2, 2, 4)),
        (normalised, "none", (2, 2, 4)),
        (lambda w, x, key: with_own_rule(w, x), "none", (2, 2, 4)),
    ],
)
def test_products_of_two_layers(layer, remat, expected):
    """Of each layer one product is for its input and one for its weights."""
    assert counts(middle(chain(layer), remat=remat)) == expected


def test_what_only_the_weights_need_is_computed_again_for_them():
    """Between two products in a row no derivative needs the value, but the second weight does."""

    def block(w, x, key):
        return jax.checkpoint(lambda w, x: jnp.tanh((x @ w) @ w))(w, x)

    assert counts(middle(chain(block), starts=(0, 1, 2))) == (4, 2, 6)
    assert counts(middle(chain(lambda w, x, key: x @ w), remat="full")) == (2, 3, 5)


def test_products_of_a_transformer_block():
    """Six products with weights, and two of activations: scores, and scores times values."""
    case = zoo.transformer()
    graph = build_graph(case.loss_fn, case.params, case.make_batch(2, 0), KEY)
    starts = [graph.names.index(f"block_{i}/norm_attention") for i in (0, 1)]
    stages = split(graph, (0, *starts))
    assert counts(differentiate(stages, ("none", "none", "none"))[1]) == (10, 6, 16)
    again = counts(differentiate(stages, ("full", "full", "full"))[1])
    assert again[1] == 6
    assert sum(again) == 2 * again[2]


def test_products_of_convolutions():
    kernel = np.ones((3, 3, 4, 4), np.float32)
    params = {f"w{i}": kernel for i in range(6)}

    def layer(w, x, key):
        layout = ("NHWC", "HWIO", "NHWC")
        return jnp.tanh(
            jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)
        )

    batch = np.ones((2, 8, 8, 4), np.float32)
    assert counts(middle(chain(layer), params, batch)) == (2, 2, 4)


def test_the_first_stage_has_a_weight_part_only():
    _, (first, *_) = stages_of(chain(plain), weights(), RECTANGLE, (0, 2, 4))
    assert not first.gradient_receives
    assert counts(first) == (0, 3, 3)
    parts = divide(first)
    assert parts.early == ()
    assert parts.input_part.equations == ()
    assert parts.input_part.outputs["held"] == first.cotangents


def test_equations_that_nothing_needs_are_in_no_part():
    parts = divide(middle(chain(checkpointed)))
    for part in (parts.input_part, parts.weight_part):
        wanted = [atom for group in part.outputs.values() for atom in group]
        assert len(jaxprs.needed(part.equations, wanted)) == len(part.equations)


# ---------------------------------------------------------------- loops and branches


def scanned(dtype=jnp.float32, decay=0.0):
    def loss_fn(p, x, rng):
        x = jnp.tanh(x @ p["first"])
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        stack = p["stack"].astype(dtype).astype(jnp.float32)
        x, _ = jax.lax.scan(step, x, stack)
        return jnp.mean((x @ p["last"]) ** 2) + decay * jnp.sum(p["stack"] ** 2)

    return loss_fn


STACKED = {
    "first": weights()["w0"],
    "stack": np.stack(list(weights().values())),
    "last": weights()["w1"],
}


@pytest.mark.filterwarnings("ignore::pdjax.PdjaxWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_loop_over_layers_is_in_the_input_part(dtype, decay):
    programs = middle(scanned(dtype, decay), STACKED, starts=(0, 1, 2))
    parts = divide(programs)
    assert counts(programs) == (2, 0, 2)
    assert (parts.early, parts.late) == ((0,), ())
    assert parts.input_part.outputs["held"] == ()
    assert parts.held_bytes == 0


@pytest.mark.filterwarnings("ignore::pdjax.PdjaxWarning")
def test_a_loop_that_is_computed_again_is_inlined_once():
    """Of `jax.checkpoint` around a loop the weight part of what follows it needs no loop."""

    def loss_fn(p, x, rng):
        @jax.checkpoint
        def block(stack, last, x):
            x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)
            return jnp.tanh(x @ last)

        x = jnp.tanh(x @ p["first"])
        x = block(p["stack"], p["last"], x)
        return jnp.mean((x @ p["end"]) ** 2)

    programs = middle(loss_fn, {**STACKED, "end": STACKED["last"]}, starts=(0, 1, 2))
    parts = divide(programs)
    assert len(parts.early) == len(parts.late) == 1  # of the loop's weights, and of the last ones
    assert counts(programs) == (1 + 1 + 3, 1, 6)
    assert [jaxprs.aval(v).shape for v in parts.input_part.outputs["held"]] == [(ROWS, WIDTH)] * 2


def test_a_branch_stays_whole():
    def layer(w, x, key):
        return jax.lax.cond(x[0, 0] > 0, lambda w, x: jnp.tanh(x @ w), lambda w, x: x @ w, w, x)

    parts = divide(middle(chain(layer)))
    assert (parts.early, parts.late) == ((0, 1), ())
    assert parts.weight_part.equations == ()


# ---------------------------------------------------------------- what waits in between


def test_what_waits_for_the_weight_part_of_a_layer():
    """Of each layer its input and the cotangent of its product."""
    parts = divide(middle(chain(plain)))
    held = parts.input_part.outputs["held"]
    assert len(held) == len(parts.kept) == 2
    assert {jaxprs.aval(var).shape for var in held} == {(ROWS, WIDTH)}
    assert parts.held_bytes == 4 * ROWS * WIDTH * 4


@pytest.mark.parametrize("remat", ["none", "full", jax.checkpoint_policies.dots_saveable])
@pytest.mark.parametrize(
    "layer", [plain, transposed_bf16, normalised, checkpointed, twice_checkpointed]
)
def test_no_weight_is_held(layer, remat):
    parts = divide(middle(chain(layer), remat=remat))
    held = parts.input_part.outputs["held"]
    assert 0 < parts.held_bytes < 2 * WEIGHT_BYTES
    assert (WIDTH, WIDTH) not in {jaxprs.aval(var).shape for var in held}


LAYERS = [plain, normalised, transposed_bf16, dropped_out, checkpointed, twice_checkpointed]


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_of_a_microbatch_is_computed_twice(layer, remat):
    """What both parts run is made of parameters and constants."""
    programs = middle(chain(layer), remat=remat)
    parts = divide(programs)
    assert_disjoint(programs, parts)
    both = set(parts.input_part.equations) & set(parts.weight_part.equations)
    if layer is normalised:
        assert any(e.primitive.name == "sqrt" for e in both)


def assert_disjoint(programs: StagePrograms, parts: DividedBackward) -> None:
    both = set(parts.input_part.equations) & set(parts.weight_part.equations)
    allowed = {*programs.inputs["params"], *programs.inputs["consts"], programs.seed}
    in_order = [e for e in parts.weight_part.equations if e in both]
    assert set(jaxprs.free_variables(in_order, [])) <= allowed
    saved = {programs.forward.outputs["saved"][at] for at in parts.kept}
    inputs = {var for name, group in programs.inputs.items() if name != "receives" for var in group}
    held = parts.input_part.outputs["held"]
    assert set(parts.weight_part.reads) <= {*inputs, *saved, *held, programs.seed}
    assert len(set(held)) == len(held)


def test_a_mask_of_the_key_is_not_made_for_the_weights():
    programs = middle(chain(dropped_out))
    parts = divide(programs)
    assert programs.inputs["key"][0] in parts.input_part.reads
    assert programs.inputs["key"][0] not in parts.weight_part.reads


def test_a_gradient_that_is_a_cotangent_is_not_held():
    params = {f"w{i}": RECTANGLE for i in range(6)}

    parts = divide(middle(chain(lambda w, x, key: jnp.tanh(x + w)), params))
    assert (parts.early, parts.late) == ((0, 1), ())
    assert parts.held_bytes == 0


def test_gradients_of_a_scaled_penalty_are_made_late():
    """The cotangent of the penalty is a scalar: it is held, rather than the gradient."""

    def loss_fn(p, x, rng):
        penalty = sum(jnp.sum(w**2) for w in p.values())
        return chain(plain)(p, x, rng) * (1 + penalty)

    parts = divide(middle(loss_fn))
    assert parts.late == (0, 1)
    shapes = [jaxprs.aval(var).shape for var in parts.input_part.outputs["held"]]
    assert sorted(shapes) == [(), (ROWS, WIDTH), (ROWS, WIDTH)]


def test_unused_and_shared_weights():
    def loss_fn(p, x, rng):
        x = jnp.tanh(x @ p["w0"])
        x = jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w1"]) * jax.lax.stop_gradient(p["w2"][0])
        return jnp.mean((x @ p["w3"]) ** 2)

    programs = middle(loss_fn, weights(4), starts=(0, 1, 2))
    parts = divide(programs)
    assert counts(programs) == (2, 2, 4)
    assert len(parts.late) == len(programs.stage.params) == 2
    assert_disjoint(programs, parts)


# ---------------------------------------------------------------- side effects


def test_side_effects_happen_once_and_pull_no_gradient_forward():
    @jax.custom_vjp
    def observed(w, x):
        return jnp.tanh(x @ w)

    def forward(w, x):
        y = observed(w, x)
        return y, (w, x, y)

    def backward(saved, g):
        w, x, y = saved
        g = g * (1 - y**2)
        gradient = x.T @ g
        jax.debug.callback(lambda value: seen.append("cotangent"), g[0, 0])
        jax.debug.callback(lambda value: seen.append("gradient"), gradient[0, 0])
        return gradient, g @ w.T

    observed.defvjp(forward, backward)
    seen: list[str] = []
    programs = middle(chain(lambda w, x, key: observed(w, x)))
    parts = divide(programs)
    assert counts(programs) == (2, 2, 4)
    effects = [
        sum(map(jaxprs.has_effects, part.equations))
        for part in (parts.input_part, parts.weight_part, programs.backward)
    ]
    assert effects == [2, 2, 4]
    values: dict[Any, Any] = {
        var: jnp.ones(jaxprs.aval(var).shape) for var in programs.backward.reads
    }
    made = parts.input_part.run(values)
    jax.effects_barrier()
    assert seen == ["cotangent"] * 2
    values |= zip(parts.input_part.outputs["held"], made["held"], strict=True)
    parts.weight_part.run(values)
    jax.effects_barrier()
    assert sorted(seen) == ["cotangent"] * 2 + ["gradient"] * 2


def test_a_callback_is_not_called_again_for_the_weights():
    """It reads parameters alone, but what it says may differ from one microbatch to the next."""
    shape = jax.ShapeDtypeStruct((), jnp.float32)

    @jax.checkpoint
    def product(w, x):
        scale = jax.pure_callback(lambda w: np.float32(2), shape, jax.lax.stop_gradient(w))
        return x @ (w * scale)

    programs = middle(chain(lambda w, x, key: jnp.tanh(product(w, x))))
    parts = divide(programs)
    calls = [
        sum(map(jaxprs.has_effects, part.equations))
        for part in (parts.input_part, parts.weight_part)
    ]
    assert calls == [2, 0]
    held = parts.input_part.outputs["held"]
    assert sorted(jaxprs.aval(var).shape for var in held) == [(), (), (ROWS, WIDTH), (ROWS, WIDTH)]
    assert_disjoint(programs, parts)


# ---------------------------------------------------------------- that it is right


class InTwoParts:
    """Runs a backward pass in its two parts, the second on what it may read only."""

    def __init__(self, programs: StagePrograms) -> None:
        self.parts = divide(programs)
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
    monkeypatch.setattr("pdjax.runtime.divided.divide", lambda programs: pytest.fail("divided"))
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
