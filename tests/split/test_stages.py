"""Where values are computed, where parameters live, what travels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.split.stages import StageSplit, split
from pdjax.trace import jaxprs
from pdjax.trace.layers import build_graph

KEY = jax.random.key(0)
BATCH = {"x": np.ones((2, 4), np.float32), "y": np.ones((2, 4), np.float32)}


def weights(count: int) -> dict[str, Any]:
    return {f"w{i}": np.ones((4, 4), np.float32) for i in range(count)}


def cut(loss_fn, params, num_stages, **options) -> StageSplit:
    """One stage for each of the first layers, the last one takes the rest."""
    return split(build_graph(loss_fn, params, BATCH, KEY, **options), range(num_stages))


def homes(stages: StageSplit) -> dict[str, tuple[int, ...]]:
    return dict(zip(stages.traced.param_names, stages.homes, strict=True))


def travels(stages: StageSplit) -> list[tuple[tuple[int, ...], int, tuple[int, ...]]]:
    """(shape, from, to) of every value that is sent."""
    return [
        (jaxprs.aval(var).shape, stage.index, targets)
        for stage in stages.stages
        for var, targets in zip(stage.sends, stage.targets, strict=True)
    ]


def chain(p, batch, rng):
    x = batch["x"]
    for i in range(4):
        x = jnp.tanh(x @ p[f"w{i}"])
    return jnp.mean((x - batch["y"]) ** 2)


def test_a_chain_sends_one_value_to_each_neighbour():
    stages = cut(chain, weights(4), 4)
    assert travels(stages) == [((2, 4), s, (s + 1,)) for s in range(3)]
    assert homes(stages) == {f"w{s}": (s,) for s in range(4)}
    assert [stage.batch for stage in stages.stages] == [(0,), (), (), (1,)]


def test_labels_go_to_the_last_stage_and_a_skip_straight_to_its_reader():
    def loss_fn(p, batch, rng):
        first = jnp.tanh(batch["x"] @ p["w0"])
        x = jnp.tanh(first @ p["w1"])
        x = jnp.tanh(x @ p["w2"])
        return jnp.mean((x @ p["w3"] + first - batch["y"]) ** 2)

    stages = cut(loss_fn, weights(4), 4)
    assert ((2, 4), 0, (1, 3)) in travels(stages)
    assert len(stages.stages[2].receives) == 1


def test_masks_and_keys_are_made_where_they_are_needed():
    def loss_fn(p, batch, rng):
        x = batch["x"]
        mask = jnp.tril(jnp.ones((4, 4))) * (batch["x"][0] > 0)
        for i in range(3):
            keep = jax.random.bernoulli(jax.random.fold_in(rng, i), 0.5, x.shape)
            x = jnp.where(keep, jnp.tanh(x @ (p[f"w{i}"])) @ mask, 0)
        return jnp.mean(x**2)

    stages = cut(loss_fn, weights(3), 3)
    assert [shape for shape, *_ in travels(stages)] == [(2, 4), (2, 4)]
    assert all(stage.uses_key for stage in stages.stages)
    assert all(stage.batch == (0,) for stage in stages.stages)


def test_a_cast_of_the_whole_tree_stays_with_the_parameters():
    def loss_fn(p, batch, rng):
        p = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)
        return chain(p, batch, rng).astype(jnp.float32)

    stages = cut(loss_fn, weights(4), 4)
    assert homes(stages) == {f"w{s}": (s,) for s in range(4)}
    assert [shape for shape, *_ in travels(stages)] == [(2, 4)] * 3


@pytest.mark.parametrize("form", ["sum at the end", "leaf by leaf", "one parameter only"])
def test_penalties_are_computed_at_home_and_sent_as_scalars(form):
    def loss_fn(p, batch, rng):
        loss = chain(p, batch, rng)
        if form == "sum at the end":
            return loss + 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
        for leaf in [p["w0"]] if form == "one parameter only" else jax.tree.leaves(p):
            loss = loss + 0.1 * jnp.sum(leaf**2)
        return loss

    stages = cut(loss_fn, weights(4), 4)
    assert homes(stages) == {f"w{s}": (s,) for s in range(4)}
    assert {shape for shape, *_ in travels(stages)} == {(2, 4), ()}


def test_a_learned_scalar_is_not_tied_by_a_penalty_on_it():
    def loss_fn(p, batch, rng):
        x = jnp.tanh(batch["x"] @ p["w0"]) * p["scale"]
        x = jnp.tanh(x @ p["w1"])
        return jnp.mean(x**2) + p["scale"] ** 2 + jnp.sum(p["w1"] ** 2)

    params = {**weights(2), "scale": np.float32(1.0)}
    stages = split(build_graph(loss_fn, params, BATCH, KEY), (0, 2))
    assert homes(stages) == {"w0": (0,), "scale": (0,), "w1": (1,)}


def test_tied_weights_live_on_all_their_stages():
    def loss_fn(p, batch, rng):
        x = jnp.tanh(batch["x"] @ p["w0"])
        x = jnp.tanh(x @ p["w1"])
        return jnp.mean((x @ p["w0"].T) ** 2)

    stages = cut(loss_fn, weights(2), 3)
    assert homes(stages) == {"w0": (0, 2), "w1": (1,)}


def test_parameters_that_work_together_live_where_they_do():
    def loss_fn(p, batch, rng):
        x = jnp.tanh(batch["x"] @ p["w0"])
        x = jnp.tanh(x @ jnp.concatenate([p["left"], p["right"]], 1))
        return jnp.mean((x @ p["w1"]) ** 2)

    params = {
        **weights(2),
        "left": np.ones((4, 1), np.float32),
        "right": np.ones((4, 3), np.float32),
    }
    found = homes(split(build_graph(loss_fn, params, BATCH, KEY), (0, 1, 2)))
    assert found == {"w0": (0,), "left": (1,), "right": (1,), "w1": (2,)}


def test_a_parameter_nobody_uses_stays_with_its_neighbour():
    params = {**weights(4), "w2b": np.ones(3, np.float32)}
    assert homes(cut(chain, params, 4))["w2b"] == (2,)


def test_a_loss_that_scales_its_input_by_a_norm_of_later_weights_still_works():
    """The norm of the last stage's weights is needed by the first stage, which must hold them."""

    def loss_fn(p, batch, rng):
        x = jnp.tanh(batch["x"] @ p["w0"]) * jnp.linalg.norm(p["w1"])
        return jnp.mean((x @ p["w1"]) ** 2)

    stages = split(build_graph(loss_fn, weights(2), BATCH, KEY), (0, 1))
    assert homes(stages)["w1"] in ((1,), (0, 1))
    for stage in stages.stages:
        assert all(source < stage.index for source in stage.sources)


def test_closed_over_arrays_are_inputs_of_the_stages_that_read_them():
    table = np.ones((32, 4), np.float32)

    def loss_fn(p, batch, rng):
        x = jnp.tanh(batch["x"] @ p["w0"])
        x = jnp.tanh(x @ p["w1"] + jnp.asarray(table)[3])
        return jnp.mean((x @ p["w2"]) ** 2)

    stages = cut(loss_fn, weights(3), 3)
    assert [len(stage.consts) for stage in stages.stages] == [0, 1, 0]


def test_only_what_carries_a_gradient_gets_one_back():
    def loss_fn(p, batch, rng):
        x = jnp.tanh(batch["x"] @ p["w0"])
        best = jnp.argmax(x, -1)
        stopped = jax.lax.stop_gradient(x * 2)
        y = jnp.tanh(x @ p["w1"]) + jax.nn.one_hot(best, 4) + stopped
        return jnp.mean((y @ p["w2"]) ** 2), {"mean": (x + y).mean()}

    stages = split(build_graph(loss_fn, weights(3), BATCH, KEY), (0, 1, 2))
    carrying = [var in stages.active_values for var in stages.stages[0].sends]
    kinds = [str(jaxprs.aval(var).dtype) for var in stages.stages[0].sends]
    assert kinds.count("int32") == 1
    assert sum(carrying) == 1


def test_state_belongs_to_the_stage_that_writes_it():
    def loss_fn(p, s, batch, rng):
        x = jnp.tanh(batch["x"] @ p["w0"])
        new = {"first": 0.9 * s["first"] + x.mean(0)}
        x = jnp.tanh(x @ p["w1"])
        new["second"] = 0.9 * s["second"] + x.mean(0)
        new["fixed"] = s["fixed"]
        return jnp.mean((x * s["fixed"]) ** 2), new

    state = {name: np.ones(4, np.float32) for name in ("first", "second", "fixed")}
    stages = cut(loss_fn, weights(2), 2, model_state=state).stages
    names = sorted(state)
    assert [[names[i] for i in stage.updates] for stage in stages] == [["first"], ["second"]]
    assert [[names[i] for i in stage.state] for stage in stages] == [["first"], ["fixed", "second"]]


@pytest.mark.parametrize("starts", [(), (1,), (0, 2, 1), (0, 5)])
def test_cuts_that_make_no_sense(starts):
    with pytest.raises(ValueError, match="layer"):
        split(build_graph(chain, weights(4), BATCH, KEY), starts)
