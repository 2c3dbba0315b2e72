"""Holds that processes that train together were given the same things."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pdjax.batches import BatchSpec
from pdjax.distributed import Peers
from pdjax.graph import LayerGraph, model_fingerprint
from pdjax.planner import Plan
from pdjax.schedules import Schedule
from pdjax.settings import Settings
from pdjax.trees import is_key, leaf_names

_SAMPLED = 4096  # elements of a leaf that are compared


def facts(
    settings: Settings, graph: LayerGraph, params: Any, key: Any, spec: BatchSpec
) -> dict[str, str]:
    """What processes must have in common, by name.

    Args:
        settings: what the user asked for.
        graph: the traced loss function.
        params: the parameters, or their shapes.
        key: the base random key.
        spec: what a minibatch looks like.
    """
    plan, schedule = settings.plan, settings.schedule
    found = {
        "the loss function": model_fingerprint(graph),
        "the batch": str(spec),
        "the schedule": schedule if isinstance(schedule, str) else f"{schedule}",
        "the plan": plan.to_json() if isinstance(plan, Plan) else str(plan),
        "the random key": _digest(np.asarray(jax.random.key_data(key) if is_key(key) else key)),
        "the optimizer": _digest_of_optimizer(settings, params),
        "the number of microbatches": str(settings.num_microbatches),
        "the weight rule": str(settings.weight_rule),
        "remat": str(settings.remat),
        "the devices": str([next(iter(p.device_set)).id for p in settings.placements]),
        "straight": str(settings.straight),
        "state_update": settings.state_update,
        "num_stages, num_chunks": f"{settings.num_stages}, {settings.num_chunks}",
    }
    if isinstance(schedule, Schedule):
        found["the schedule"] = schedule.to_json()
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        found[f"the parameter {name!r}"] = _digest_of_leaf(leaf)
    return {name: re.sub(r" at 0x[0-9a-f]+", "", text) for name, text in found.items()}


def check_agreement(peers: Peers, mine: dict[str, str]) -> None:
    """Compares with what the other processes were given.

    Raises:
        ValueError: if something differs; in every process, with the first difference by name.
    """
    digests = {name: text if len(text) < 100 else _digest(text) for name, text in mine.items()}
    said: Sequence[dict[str, str]] = peers.exchange("what is trained", digests)
    for process, theirs in enumerate(said):
        for name in [*said[0], *(name for name in theirs if name not in said[0])]:
            first, other = said[0].get(name, "nothing"), theirs.get(name, "nothing")
            if first != other:
                raise ValueError(
                    f"the processes disagree about {name}: process 0 on {peers.hosts[0]} has "
                    f"{first}, process {process} on {peers.hosts[process]} has {other}. Start all "
                    "with the same program, arguments, data and seed."
                )


def _digest(about: str | np.ndarray) -> str:
    content = about.encode() if isinstance(about, str) else np.ascontiguousarray(about).tobytes()
    return hashlib.sha256(content).hexdigest()[:12]


def _digest_of_leaf(leaf: Any) -> str:
    """Of a sample of the elements, so that large models start quickly."""
    shape = f"{leaf.dtype}{list(leaf.shape)}"
    if isinstance(leaf, jax.ShapeDtypeStruct) or is_key(leaf):
        return shape
    flat = leaf.reshape(-1)
    step = max(1, flat.size // _SAMPLED)
    return f"{shape}, digest {_digest(np.asarray(flat[::step]))}"


def _digest_of_optimizer(settings: Settings, params: Any) -> str:
    shapes = jax.eval_shape(lambda: params)
    state = jax.eval_shape(settings.optimizer.init, shapes)
    update = jax.make_jaxpr(settings.optimizer.update)(shapes, state, shapes)
    return _digest(re.sub(r" at 0x[0-9a-f]+", "", f"{update}"))
