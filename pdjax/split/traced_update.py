"""An optimizer's update and its initial state, traced over the whole parameter tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pdjax.trace import inline, jaxprs
from pdjax.trace.inline import InlinedProgram
from pdjax.trace.jaxprs import Atom, Var


@dataclass(frozen=True, eq=False)
class TracedUpdate:
    """``optimizer.update`` followed by ``optax.apply_updates``, as equations.

    Attributes:
        program: the equations.
        params: a variable for each parameter leaf.
        grads: a variable for each gradient leaf.
        state: a variable for each leaf of the optimizer state.
        num_minibatches: the variable of the number of minibatches that the update is made for;
            None if that is always one.
        new_params: the new value of each parameter leaf.
        new_state: the new value of each leaf of the optimizer state.
        state_tree: the structure of the optimizer state.
    """

    program: InlinedProgram
    params: tuple[Var, ...]
    grads: tuple[Var, ...]
    state: tuple[Var, ...]
    num_minibatches: Var | None
    new_params: tuple[Atom, ...]
    new_state: tuple[Atom, ...]
    state_tree: Any


def trace_update(
    optimizer: optax.GradientTransformation,
    params: Any,
    *,
    rounds: bool = False,
    scales: Sequence[float] | None = None,
) -> TracedUpdate:
    """Traces an update; arguments and errors as of `pdjax.split.optimizer.split_update`."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: params))
    state_leaves, state_tree = jax.tree.flatten(jax.eval_shape(optimizer.init, params))
    counts = schedule_counts(jax.tree.unflatten(state_tree, range(len(state_leaves))))
    rounds = rounds and bool(counts)

    def update(
        p: list[Any], g: list[Any], s: list[Any], num_minibatches: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        old = jax.tree.unflatten(tree, p)
        gradients, state = jax.tree.unflatten(tree, g), jax.tree.unflatten(state_tree, s)
        updates, state = optimizer.update(gradients, state, old)
        updates = _scaled(updates, tree, scales)
        new = jax.tree.leaves(state)
        for at in counts if rounds else ():
            new[at] = s[at] + (new[at] - s[at]) * num_minibatches[0].astype(s[at].dtype)
        return jax.tree.leaves(optax.apply_updates(old, updates)), new

    extra = [jax.ShapeDtypeStruct((), jnp.int32)] if rounds else []
    program = _trace(update, leaves, leaves, state_leaves, extra)
    count = len(leaves)
    return TracedUpdate(
        program=program,
        params=program.invars[:count],
        grads=program.invars[count : 2 * count],
        state=program.invars[2 * count : len(program.invars) - rounds],
        num_minibatches=program.invars[-1] if rounds else None,
        new_params=program.outvars[:count],
        new_state=program.outvars[count:],
        state_tree=state_tree,
    )


def _scaled(updates: Any, tree: Any, scales: Sequence[float] | None) -> Any:
    """The updates of all leaves, times their factors; a factor of 1 leaves no trace."""
    if scales is None:
        return updates
    pairs = zip(jax.tree.leaves(updates), scales, strict=True)
    return jax.tree.unflatten(tree, [u if k == 1 else u * k for u, k in pairs])


def _trace(update: Any, *shapes: Any) -> InlinedProgram:
    try:
        program, _ = inline.trace(update, *shapes, branches_as_selects=True)
    except TypeError as error:
        raise ValueError(
            f"optimizer.update(gradients, state, params) failed: {error}. pdjax gives an optimizer "
            "these three; one that needs more, such as the loss, cannot be used."
        ) from error
    if any(map(jaxprs.has_effects, program.equations)):
        raise ValueError(
            "the optimizer's update has side effects (callbacks or prints), which cannot be "
            "divided among the stages. Take them out of the optimizer, or put them into loss_fn."
        )
    return program


def schedule_counts(state: Any) -> list[Any]:
    """The counters of an optimizer state by which optax schedules its hyperparameters.

    A moment's own counter, which says how many updates it has seen, is none.
    """
    return [part.count for part in _parts(state) if isinstance(part, _SCHEDULED)]


_SCHEDULED = (
    optax.ScaleByScheduleState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
)


def _parts(state: Any) -> Iterator[Any]:
    """All nodes of an optimizer state."""
    yield state
    children = jax.tree.leaves(state, is_leaf=lambda node: node is not state)
    for child in children if not (len(children) == 1 and children[0] is state) else ():
        yield from _parts(child)


def init_program(
    optimizer: optax.GradientTransformation, params: Any
) -> tuple[InlinedProgram, Any]:
    """The trace of ``optimizer.init`` over the parameter leaves, and the state's structure."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: params))
    return inline.trace(lambda *p: optimizer.init(jax.tree.unflatten(tree, p)), *leaves)
