"""One of two processes that get into all kinds of trouble, and writes the messages that it gets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))

import zoo

import pdjax
from pdjax import distributed
from pdjax.profile.profile import LayerProfile

folder = Path(sys.argv[1])
peers = distributed.initialize()
differs = peers.process_id == 1
case = zoo.dense_blocks(num_blocks=2)


def changed(before: Any, after: Any) -> Any:
    """What the first process is given, and what the second."""
    return after if differs else before


def init(
    options: dict[str, Any] | None = None,
    *,
    loss_fn: Any = case.loss_fn,
    optimizer: Any = None,
    params: Any = case.params,
    batch: Any = None,
    **given: Any,
) -> tuple[pdjax.Pipeline, pdjax.PipelineState]:
    chosen = {"schedule": "one_f_one_b", "num_microbatches": 2, "plan": "balanced"}
    pipe = pdjax.Pipeline(
        loss_fn, optimizer or optax.sgd(0.1), **{"num_stages": 2, **chosen, **(options or {})}
    )
    return pipe, pipe.init(params, batch or case.make_batch(8, 0), **given)


def loss_with_state(params: Any, state: Any, batch: Any, rng: Any) -> Any:
    return case.loss_fn(params, batch, rng), {"seen": state["seen"] + 1}


def loss_without_key(params: Any, batch: Any) -> Any:
    return case.loss_fn(params, batch, None)


def made(seed: int) -> Any:
    return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(seed), leaf.shape), PARAMS)


def other_leaf(name: str, leaf: Any) -> Any:
    return {**case.params, "block_1": {**case.params["block_1"], name: leaf}}


PARAMS = jax.eval_shape(lambda: case.params)
SEEN = {"seen": np.int32(0)}, {"seen": np.int32(1)}
FIRST, TABLE = jax.devices()[:1], np.arange(4, dtype=np.float32)
DISAGREEMENTS = {
    "the random key": lambda: init(rng=jax.random.key(changed(0, 1))),
    "the batch leaf 'x'": lambda: init(batch=case.make_batch(changed(8, 4), 0)),
    "the schedule": lambda: init({"schedule": changed("one_f_one_b", "gpipe")}),
    "the plan": lambda: init({"plan": changed("balanced", ["block_1"])}),
    "the topology": lambda: init({"plan": "auto", "topology": changed(None, "2@1GB/s")}),
    "run_ahead": lambda: init({"run_ahead": changed(None, 2)}),
    "nonfinite": lambda: init({"nonfinite": changed("raise", "ignore")}),
    "the eval_loss_fn": lambda: init({"eval_loss_fn": changed(None, loss_without_key)}),
    "num_microbatches": lambda: init({"num_microbatches": changed(2, 4)}),
    "the devices": lambda: init({"devices": jax.devices()[:: changed(1, -1)]}),
    "remat": lambda: init({"remat": changed("none", "full")}),
    "the parameter 'block_1/b'": lambda: init(params=other_leaf("b", changed(TABLE, TABLE + 1))),
    "the parameter 'block_1/c'": lambda: init(params=changed(case.params, other_leaf("c", 1.0))),
    "the function that makes the parameters": lambda: init(params=lambda: made(changed(0, 1))),
    "the model_state leaf 'seen'": lambda: init(
        loss_fn=loss_with_state, model_state=changed(*SEEN)
    ),
    "the loss function": lambda: init(
        loss_fn=lambda p, b: changed(1, 2) * case.loss_fn(p, b, None)
    ),
    "what the loss function closes over": lambda: init(
        loss_fn=lambda p, b: (
            case.loss_fn(p, b, None) + jnp.sum(p["block_1"]["b"] * changed(TABLE, TABLE + 1))
        )
    ),
    "the optimizer": lambda: init(optimizer=optax.sgd(changed(0.1, 0.2))),
}
"""What differs, by the name that the error gives it."""


def refusal(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


said: dict[str, Any] = {
    "disagreements": {name: refusal(call) for name, call in DISAGREEMENTS.items()},
    "too many stages": refusal(lambda: init({"num_stages": 3})),
    "devices of process 0": refusal(lambda: init({"num_stages": 1, "devices": FIRST})),
}
pipe, state = init()
batch = case.make_batch(8, 0)
shapes = jax.eval_shape(lambda: batch)
said["step shapes"] = refusal(lambda: pipe.step(state, shapes))
said["evaluate shapes"] = refusal(lambda: pipe.evaluate(state, shapes))
said["reads"] = pipe.reads()
mine = {name: batch[name] if is_read else shapes[name] for name, is_read in pipe.reads().items()}
state, metrics = pipe.step(state, mine)
said["loss"] = float(metrics["loss"])

# A loss that is not finite is noticed by both at the same step, though one has seen it before.
pipe, state = init({"run_ahead": 3})
for said["nonfinite"] in range(8):
    try:
        state, metrics = pipe.step(state, {**batch, "y": batch["y"] * np.nan})
    except pdjax.NonFiniteLossError:
        break
    if differs:
        jax.block_until_ready(metrics)

# A plan for links that both measure.
layers = tuple(LayerProfile(f"block_{i}", 1e-3, 2e-3, 1e6, 8.0) for i in range(2))
profile = pdjax.Profile(layers, batch_size=4)
pipe, state = init({"plan": "auto", "profile": profile})
said["cuts"] = pipe.plan.first_layers

# One that may replicate, because there are several processes: gradients are nothing to send.
pipe, _ = init({"plan": "auto", "profile": profile, "topology": "2@1MB/s", "num_stages": None})
said["replicas"] = pipe.plan.replicas
pipe, state = init({"plan": "auto", "profile": profile})

# Minibatches of different sizes.
for _ in range(2):
    state, metrics = pipe.step(state, case.make_batch(changed(8, 4), 0))
try:
    pipe.drain(state)
except pdjax.BrokenPipelineError as error:
    said["sizes"] = str(error)
(folder / f"{peers.process_id}.json").write_text(json.dumps(said))

# An error of one process's program, while the other waits for it.
pipe, state = init()
with pipe.record(state):
    if differs:
        raise KeyError("a mistake")
    pipe.step(state, batch)
