"""From a loss function to equations, sorted by the inputs that they depend on.

`trace_loss` runs the user's function once on abstract values. Every value is of one kind:

    CONSTANT   depends on nothing but constants
    FREE       on the batch or the random key, and on no parameter: cheap to repeat anywhere
    PARAMETER  on parameters and constants only: casts, transposes, weight decay terms
    LINE       on more than that: the computation that a pipeline cuts

Matrix products and loops are never FREE (they would be repeated in every stage that needs them),
and every equation with a side effect is on the line, where it runs once.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from pdjax.trace import inline, jaxprs
from pdjax.trace.dataflow import DataFlow
from pdjax.trace.inline import InlinedProgram
from pdjax.trace.jaxprs import Atom, Equation, Var
from pdjax.trace.leaf_range import LeafRange, whole_leaves
from pdjax.trees import leaf_names, shape_of


class ValueKind(enum.Enum):
    """The inputs that a value depends on (see the module's docstring)."""

    CONSTANT = "constant"
    FREE = "free"
    PARAMETER = "parameter"
    LINE = "line"


@dataclass(frozen=True, eq=False)
class TracedLoss:
    """A loss function as equations, with the role of each input and output.

    Attributes:
        program: the equations.
        params: a variable for each parameter.
        state: a variable for each leaf of the mutable state.
        batch: a variable for each batch leaf, shaped as in one microbatch.
        key: the variable of the random key.
        param_ranges: for each parameter the leaf of the user's pytree, or the range of a leaf, that
            it is. Today always whole leaves, in order.
        param_names: the name of each parameter, such as ``"block_0/Dense_1/kernel"``.
        state_names: the same for the mutable state.
        loss: the scalar loss (with a weight: the sum).
        weight: the scalar weight that the sum is divided by, or None.
        new_state: the mutable state after the call, leaf by leaf.
        metrics: the flat metrics.
        metrics_tree: the structure of the metrics, or None if the function returns none.
        kinds: the kind of each variable.
        summaries: PARAMETER values that are so much smaller than their parameters that they are
            sent to where they are needed rather than the parameters.
    """

    program: InlinedProgram
    params: tuple[Var, ...]
    state: tuple[Var, ...]
    batch: tuple[Var, ...]
    key: Var
    param_ranges: tuple[LeafRange, ...]
    param_names: tuple[str, ...]
    state_names: tuple[str, ...]
    loss: Atom
    weight: Atom | None
    new_state: tuple[Atom, ...]
    metrics: tuple[Atom, ...]
    metrics_tree: Any
    kinds: dict[Var, ValueKind] = field(repr=False)
    summaries: frozenset[Var] = field(repr=False)

    @property
    def equations(self) -> tuple[Equation, ...]:
        """The equations in program order."""
        return self.program.equations

    @property
    def flow(self) -> DataFlow:
        """The data flow of the equations."""
        return self.program.flow

    def kind(self, atom: Atom) -> ValueKind:
        """The kind of `atom`; a literal is a constant."""
        return self.kinds[atom] if isinstance(atom, Var) else ValueKind.CONSTANT

    def wide_params(self, atoms: Sequence[Atom]) -> frozenset[Var]:
        """The parameters that must be at hand to compute `atoms`: not reached by a summary."""

        def is_wide(var: Var) -> bool:
            return self.kind(var) is ValueKind.PARAMETER and var not in self.summaries

        wide = filter(is_wide, jaxprs.variables(atoms))
        values = self.flow.sources(wide, lambda _, var: is_wide(var))
        return frozenset(var for var in values if var not in self.flow.makers)


# ---------------------------------------------------------------- tracing


@dataclass
class _Outputs:
    """The structure of the function's result, found by the trace."""

    metrics_tree: Any = None


def trace_loss(
    loss_fn: Callable[..., Any],
    params: Any,
    batch: Any,
    rng: Any,
    *,
    model_state: Any = None,
    weighted_loss: bool = False,
) -> TracedLoss:
    """Traces `loss_fn` at the shapes of one microbatch.

    Args:
        loss_fn: ``loss_fn(params, batch, rng)`` that returns ``loss`` or ``(loss, metrics)``;
            with `model_state`, ``loss_fn(params, model_state, batch, rng)`` that returns
            ``(loss, new_state)`` or ``(loss, (new_state, metrics))``.
        params: pytree of real or complex arrays (or of their shapes).
        batch: pytree of arrays, or of shapes, of one microbatch.
        rng: a random key.
        model_state: mutable collections such as BatchNorm statistics.
        weighted_loss: whether the function returns ``(sum, weight)`` in the place of the loss.

    Raises:
        ValueError: if the result has another form, the loss is not a real scalar or depends on
            nothing, a metric is called "loss" and is something else, a parameter cannot be
            differentiated, or the function cannot be cut (it uses ordered effects, mutable
            arrays or sharding annotations).
    """
    param_leaves, param_tree = jax.tree.flatten(params)
    state_leaves, state_tree = jax.tree.flatten(model_state)
    batch_leaves, batch_tree = jax.tree.flatten(batch)
    param_names, state_names = leaf_names(params), leaf_names(model_state)
    _check_differentiable(param_leaves, param_names)
    outputs = _Outputs()

    def flattened(p: list[Any], s: list[Any], b: list[Any], key: Any) -> tuple[Any, ...]:
        arguments = [jax.tree.unflatten(param_tree, p), jax.tree.unflatten(batch_tree, b), key]
        if model_state is not None:
            arguments.insert(1, jax.tree.unflatten(state_tree, s))
        result = loss_fn(*arguments)
        loss, new_state, metrics = read_result(result, model_state, weighted_loss)
        total, weight = _read_loss(loss, weighted_loss)
        metric_leaves, tree = jax.tree.flatten(metrics)
        outputs.metrics_tree = None if metrics is None else tree
        return total, weight, new_state, list(map(_as_metric, metric_leaves))

    shapes = jax.tree.map(shape_of, (param_leaves, state_leaves, batch_leaves, rng))
    program, _ = inline.trace(flattened, *shapes)
    _check_supported(program)
    _check_equal_state(program.outvars[2 : 2 + len(state_leaves)], state_leaves, state_names)
    traced = _assemble(program, param_names, state_names, len(batch_leaves), weighted_loss, outputs)
    _check_metric_names(traced)
    return traced


def _assemble(
    program: InlinedProgram,
    param_names: tuple[str, ...],
    state_names: tuple[str, ...],
    num_batch_leaves: int,
    weighted_loss: bool,
    outputs: _Outputs,
) -> TracedLoss:
    num_params, num_states = len(param_names), len(state_names)
    ranges = whole_leaves(num_params)
    invars, outvars = iter(program.invars), iter(program.outvars)
    params, state = _take(invars, num_params), _take(invars, num_states)
    batch, (key,) = _take(invars, num_batch_leaves), _take(invars, 1)
    loss, weight = next(outvars), next(outvars)
    kinds = _classify(program, params, state, batch, key)
    if not isinstance(loss, Var) or kinds[loss] in (ValueKind.CONSTANT, ValueKind.FREE):
        raise ValueError(
            "the loss depends on no parameter; expected a loss that a gradient step can lower. "
            "Check that loss_fn uses the params that it is given."
        )
    return TracedLoss(
        program=program,
        params=params,
        state=state,
        batch=batch,
        key=key,
        param_ranges=ranges,
        param_names=tuple(part.name(param_names[part.leaf]) for part in ranges),
        state_names=state_names,
        loss=loss,
        weight=weight if weighted_loss else None,
        new_state=_take(outvars, num_states),
        metrics=tuple(outvars),
        metrics_tree=outputs.metrics_tree,
        kinds=kinds,
        summaries=_find_summaries(program, params, kinds),
    )


def _take(items: Iterator[Any], count: int) -> tuple[Any, ...]:
    return tuple(next(items) for _ in range(count))


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def read_result(result: Any, model_state: Any, weighted: bool) -> tuple[Any, list[Any], Any]:
    """Splits a loss function's result into (loss, leaves of the new state, metrics).

    Args:
        result: the value that the function returned.
        model_state: the mutable state that it was given, or None if it takes none.
        weighted: whether the loss is a pair (sum, weight).
    """
    is_pair = _is_pair(result)
    if model_state is None:
        has_metrics = is_pair and (not weighted or _is_pair(result[0]))
        return (result[0], [], result[1]) if has_metrics else (result, [], None)
    tree = jax.tree.structure(model_state)
    if is_pair and jax.tree.structure(result[1]) == tree:
        return result[0], jax.tree.leaves(result[1]), None
    if is_pair and _is_pair(result[1]):
        new_state, metrics = result[1]
        if jax.tree.structure(new_state) == tree:
            return result[0], jax.tree.leaves(new_state), metrics
    raise ValueError(
        f"with model_state, loss_fn must return (loss, new_state) or (loss, (new_state, metrics)) "
        f"where new_state has the structure {tree}; it returned {jax.tree.structure(result)}."
    )


def _read_loss(loss: Any, weighted: bool) -> tuple[Any, Any]:
    """Splits the loss into (value, weight), both checked to be real scalars."""
    if weighted and not _is_pair(loss):
        raise ValueError(
            "with weighted_loss=True the loss must be a pair (sum, weight); got one value. "
            "Return the sum over the examples and what to divide it by, or drop weighted_loss."
        )
    value, weight = loss if weighted else (loss, 1.0)
    _check_scalar(value, "loss", (jnp.floating,))
    _check_scalar(weight, "weight", (jnp.floating, jnp.integer))
    dtype = jnp.promote_types(jnp.result_type(value), jnp.float32)
    return jnp.asarray(value), jax.lax.stop_gradient(jnp.asarray(weight, dtype))


def _as_metric(leaf: Any) -> jax.Array:
    """A metric as an array; of a condition the share of microbatches in which it holds."""
    value = jnp.asarray(leaf)
    return value.astype(jnp.float32) if value.dtype == bool and value.shape == () else value


def _check_scalar(value: Any, what: str, allowed: tuple[Any, ...]) -> None:
    if not jax.tree_util.all_leaves([value]) or value is None:
        got = f"a {type(value).__name__}"
    else:
        shape, dtype = jnp.shape(value), jnp.result_type(value)
        if shape == () and any(jnp.issubdtype(dtype, kind) for kind in allowed):
            return
        got = f"{dtype}{list(shape)}"
    raise ValueError(
        f"the {what} must be a real scalar; loss_fn returned {got}. Reduce it, for example with "
        ".mean(); metrics go into a second result: return loss, metrics."
    )


# ---------------------------------------------------------------- checks


def _check_differentiable(leaves: list[Any], names: tuple[str, ...]) -> None:
    if not leaves:
        raise ValueError("params holds no arrays; expected a pytree with at least one parameter.")
    for leaf, name in zip(leaves, names, strict=True):
        dtype = shape_of(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"parameter {name!r} has dtype {dtype}, which has no gradient. Move it out of "
                "params: into the batch, a constant of the function, or model_state."
            )


def _check_supported(program: InlinedProgram) -> None:
    for equation, path in zip(program.equations, program.paths, strict=True):
        reason = jaxprs.unsupported(equation)
        if reason:
            where = f" in {path!r}" if path else ""
            raise ValueError(
                f"the loss function uses {reason}{where} ({equation.primitive.name}), which cannot "
                "be cut into stages. Use unordered callbacks, and functions without mutable "
                "arrays or sharding annotations."
            )


def _check_equal_state(new: Sequence[Atom], old: list[Any], names: tuple[str, ...]) -> None:
    for atom, leaf, name in zip(new, old, names, strict=True):
        before, after = shape_of(leaf), jaxprs.shape_of(atom)
        if (after.shape, after.dtype) != (before.shape, before.dtype):
            raise ValueError(
                f"model_state {name!r} goes in as {before.dtype}{list(before.shape)} and comes "
                f"out as {after.dtype}{list(after.shape)}; expected the same shape and dtype."
            )


def _check_metric_names(traced: TracedLoss) -> None:
    """Raises ValueError if a metric is called "loss" and is another value than the loss."""
    if traced.metrics_tree is None:
        return
    metrics = jax.tree.unflatten(traced.metrics_tree, traced.metrics)
    if isinstance(metrics, Mapping) and metrics.get("loss", traced.loss) is not traced.loss:
        raise ValueError(
            "loss_fn returns a metric called 'loss' that is not the loss itself, which pdjax "
            "reports by that name. Give the metric another name."
        )


# ---------------------------------------------------------------- kinds of values


def _classify(
    program: InlinedProgram,
    params: Sequence[Var],
    state: Sequence[Var],
    batch: Sequence[Var],
    key: Var,
) -> dict[Var, ValueKind]:
    """The kind of each value: that of its inputs together, or LINE where it must run once."""
    inputs = dict.fromkeys(program.constvars, ValueKind.CONSTANT)
    inputs |= dict.fromkeys(params, ValueKind.PARAMETER)
    inputs |= dict.fromkeys(state, ValueKind.LINE)
    inputs |= dict.fromkeys([*batch, key], ValueKind.FREE)

    def kind_of_results(equation: Equation, reads: dict[Var, ValueKind]) -> ValueKind:
        kind = _kind_of(set(reads.values()))
        unrepeatable = jaxprs.is_heavy(equation) and kind is not ValueKind.PARAMETER
        return ValueKind.LINE if unrepeatable or jaxprs.has_effects(equation) else kind

    return program.flow.propagate(inputs, kind_of_results)


def _kind_of(inputs: set[ValueKind]) -> ValueKind:
    if ValueKind.LINE in inputs or {ValueKind.FREE, ValueKind.PARAMETER} <= inputs:
        return ValueKind.LINE
    for kind in (ValueKind.FREE, ValueKind.PARAMETER):
        if kind in inputs:
            return kind
    return ValueKind.CONSTANT


def _find_summaries(
    program: InlinedProgram, params: Sequence[Var], kinds: dict[Var, ValueKind]
) -> frozenset[Var]:
    """PARAMETER values with fewer elements than the largest parameter behind them."""

    def largest_behind(equation: Equation, reads: dict[Var, int]) -> int | None:
        of_params = all(kinds[var] is ValueKind.PARAMETER for var in equation.outvars)
        return max(reads.values(), default=0) if of_params else None

    sizes = {var: jaxprs.num_elements(var) for var in params}
    largest = program.flow.propagate(sizes, largest_behind)
    return frozenset(
        var
        for var, size in largest.items()
        if var not in sizes and jaxprs.num_elements(var) < max(size, 2)
    )
