"""Holds that processes that train together were given the same things."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pdjax.distributed import Peers
from pdjax.pipeline.batch import BatchSpec
from pdjax.pipeline.settings import Settings
from pdjax.trace import jaxprs
from pdjax.trace.layers import LayerGraph
from pdjax.trees import is_function, is_key, leaf_names, shape_of, shapes_of

REMEDY = "Start all with the same program, arguments, data and seed."
"""What is advised where processes were given different things."""

_SAMPLED = 4096  # elements of a leaf that are compared
_SHOWN = 100  # characters up to which a fact is shown as it is


def facts(
    settings: Settings, graph: LayerGraph, key: Any, spec: BatchSpec, params: Any, model_state: Any
) -> dict[str, str]:
    """What processes must have in common, by name; what explains other differences comes first.

    Args:
        settings: what the user asked for.
        graph: the loss function, traced for a microbatch.
        key: the base random key.
        spec: what a minibatch looks like.
        params: the parameters, or the function that makes them.
        model_state: the mutable state, or the function that makes it.
    """
    found = settings.texts()
    for name, shape, axis in zip(spec.names, spec.shapes, spec.axes, strict=True):
        found[f"the batch leaf {name!r}"] = f"{_text_of_shape(shape)}, batch axis {axis}"
    found["the random key"] = _text_of_leaf(key)
    found |= _facts_of_tree("parameters", "parameter", params)
    found |= _facts_of_tree("model_state", "model_state leaf", model_state)
    program = graph.traced.program
    found["the loss function"] = f"digest {jaxprs.fingerprint(program.equations)}"
    found["what the loss function closes over"] = str(list(map(_text_of_leaf, program.consts)))
    found["the optimizer"] = _digest(" ".join(_texts_of_optimizer(settings, shapes_of(params))))
    return {name: _without_addresses(text) for name, text in found.items()}


def check_agreement(peers: Peers, mine: dict[str, str], remedy: str = REMEDY) -> None:
    """Compares with what the other processes were given.

    Args:
        peers: the processes.
        mine: what this one was given, as text, by names.
        remedy: what to do where they differ.

    Raises:
        ValueError: if something differs; in every process, with one difference by name: something
            that only one of them has, or else the first.
    """
    short = {name: text if len(text) <= _SHOWN else _digest(text) for name, text in mine.items()}
    said: Sequence[dict[str, str]] = peers.exchange("what is trained", short)
    for process, theirs in enumerate(said):
        for name in _names(said[0], theirs):
            first, other = said[0].get(name, "nothing"), theirs.get(name, "nothing")
            if first != other:
                raise ValueError(
                    f"the processes disagree about {name}: process 0 on {peers.hosts[0]} has "
                    f"{first}, process {process} on {peers.hosts[process]} has {other}. {remedy}"
                )


def _names(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """All names; those that only one has come first, because they explain the most."""
    common = mine.keys() & theirs.keys()
    return sorted({**mine, **theirs}, key=lambda name: name in common)


def _facts_of_tree(all_of_it: str, leaf_of_it: str, given: Any) -> dict[str, str]:
    if is_function(given):
        return {f"the function that makes the {all_of_it}": _digest(_text_of_function(given))}
    pairs = zip(leaf_names(given), jax.tree.leaves(given), strict=True)
    return {f"the {leaf_of_it} {name!r}": _text_of_leaf(leaf) for name, leaf in pairs}


def _text_of_leaf(leaf: Any) -> str:
    """Of a sample of the elements, so that large models start quickly."""
    shape = shape_of(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return _text_of_shape(shape)
    flat = np.asarray(jax.random.key_data(leaf) if is_key(shape) else leaf).reshape(-1)
    step = max(1, flat.size // _SAMPLED)
    return f"{_text_of_shape(shape)}, {_digest(flat[::step].tobytes())}"


def _text_of_shape(shape: jax.ShapeDtypeStruct) -> str:
    return f"{shape.dtype}{list(shape.shape)}"


def _texts_of_optimizer(settings: Settings, params: Any) -> Iterator[str]:
    optimizer = settings.optimizer
    state = jax.eval_shape(optimizer.init, params)
    yield _text_of_function(optimizer.init, params)
    yield _text_of_function(optimizer.update, params, state, params)


def _text_of_function(function: Callable[..., Any], *shapes: Any) -> str:
    traced = jax.make_jaxpr(function)(*shapes)
    return _without_addresses(f"{traced} {list(map(_text_of_leaf, traced.consts))}")


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _digest(about: str | bytes) -> str:
    content = about.encode() if isinstance(about, str) else about
    return f"digest {hashlib.sha256(content).hexdigest()[:12]}"
