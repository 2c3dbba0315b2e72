"""A model, its data and its loss functions."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pdjax import data
from pdjax.models import MODELS, find_model
from pdjax.trees import shapes_of

_DEFAULT_DATA = {"text": "stdlib", "image": "digits"}


@dataclass(frozen=True)
class Task:
    """What is to be trained, on what.

    Attributes:
        dataset: the data.
        params: the initial parameters; or their shapes, or a function that makes them.
        model_state: the initial mutable state (BatchNorm statistics) likewise, or None.
        loss_fn: the training loss, as `pdjax.Pipeline` takes it.
        eval_loss_fn: the loss without dropout and with the moving averages of BatchNorm.
        num_parameters: number of trained numbers.
    """

    dataset: data.Dataset
    params: Any
    model_state: Any
    loss_fn: Callable[..., Any]
    eval_loss_fn: Callable[..., Any]
    num_parameters: int


Initial = Literal["arrays", "functions", "shapes"]
"""In what form a task has its initial parameters: made, to be made by the stages, or not at all."""


def make_task(
    model_name: str,
    data_source: str | None = None,
    *,
    seed: int = 0,
    sequence_length: int = 128,
    model_fields: Sequence[str] = (),
    initial: Initial = "arrays",
) -> Task:
    """Loads the data, builds the model and initialises its parameters.

    Args:
        model_name: a name in `pdjax.models.MODELS`.
        data_source: as `pdjax.data.load` takes it; the usual one for the kind of model if None.
        seed: decides the initial parameters and the order of the data.
        sequence_length: tokens in an example of text.
        model_fields: sizes of the model, as ``"NAME=VALUE"``.
        initial: the form of parameters and mutable state; only as arrays they take memory.

    Raises:
        ValueError: for an unknown model or data source, one that does not go with the other, or
            fields that the model does not have.
    """
    spec = find_model(model_name)
    source = data_source or _DEFAULT_DATA[spec.takes]
    dataset = data.load(
        source,
        seed=seed,
        sequence_length=sequence_length,
        image_size=spec.image_size,
    )
    if dataset.kind != spec.takes:
        raise ValueError(
            f"model {model_name!r} takes {spec.takes}, but {source!r} is {dataset.kind}. Use "
            f"--data {_DEFAULT_DATA[spec.takes]}, or one of the models for {dataset.kind}: "
            f"{', '.join(name for name, s in MODELS.items() if s.takes == dataset.kind)}."
        )
    model = spec.build(dataset.num_classes, **_read_fields(model_fields))
    example = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], dataset.train[0])
    params, model_state = _initial(model, _init_key(seed), example["x"], initial)
    shapes = shapes_of(params)
    stateful = model_state is not None
    return Task(
        dataset=dataset,
        params=params,
        model_state=model_state,
        loss_fn=_loss(model, train=True, stateful=stateful),
        eval_loss_fn=_loss(model, train=False, stateful=stateful),
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
    )


def _initial(model: nn.Module, key: jax.Array, x: jax.Array, form: Initial) -> tuple[Any, Any]:
    """Parameters, and mutable state or None, in one of the forms."""

    def make(key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
        state = dict(model.init(key, x))
        return state.pop("params"), state

    run = jax.jit(make) if form == "arrays" else partial(jax.eval_shape, make)
    params, state = run(key, x)
    if form == "functions":
        return lambda: make(key, x)[0], (lambda: make(key, x)[1]) if state else None
    return params, state or None


def _init_key(seed: int) -> jax.Array:
    """A key of an implementation for which many small initialisers compile quickly."""
    return jax.random.key(seed, impl="rbg")


def _loss(model: nn.Module, *, train: bool, stateful: bool) -> Callable[..., Any]:
    """The mean cross-entropy of the model's logits, with the accuracy as a metric."""

    def score(logits: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses.mean(), {"accuracy": jnp.mean(logits.argmax(-1) == batch["y"])}

    def loss_fn(params: Any, batch: Any, rng: Any) -> Any:
        variables, rngs = {"params": params}, {"dropout": rng}
        logits: Any = model.apply(variables, batch["x"], train=train, rngs=rngs)
        return score(logits, batch)

    def stateful_loss_fn(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        logits, new_state = model.apply(
            {"params": params, **model_state},
            batch["x"],
            train=train,
            rngs={"dropout": rng},
            mutable=list(model_state),
        )
        loss, metrics = score(logits, batch)
        return loss, (dict(new_state), metrics)

    return stateful_loss_fn if stateful else loss_fn


def _read_fields(fields: Sequence[str]) -> dict[str, Any]:
    values = {}
    for field in fields:
        name, equals, text = field.partition("=")
        if not equals:
            raise ValueError(f"got the model field {field!r}; expected NAME=VALUE, as width=256.")
        try:
            values[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            values[name] = text
    return values
