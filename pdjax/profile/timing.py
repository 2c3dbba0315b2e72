"""Running the passes of a stage with made-up inputs, against the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from pdjax.split.differentiate import StagePrograms
from pdjax.trace import dataflow, jaxprs
from pdjax.trace.jaxprs import Var
from pdjax.trace.jit import Values, jit_on
from pdjax.trace.program import Program
from pdjax.trees import is_key

_SAMPLE_S = 3e-3  # long against the clock's resolution and the wait for the last call
_MAX_CALLS = 300
_STEP = 1e-1  # standard deviation of made-up activations and weights


class Pass:
    """A forward or a backward pass of a stage, compiled by itself.

    Side effects that no value depends on (prints, callbacks) are left out.

    Attributes:
        reads: the values that it takes.
        makes: the values that it returns, each once.
    """

    def __init__(self, program: Program, placement: Sharding) -> None:
        self.makes = jaxprs.variables(atom for group in program.outputs.values() for atom in group)
        kept = [program.equations[i] for i in dataflow.needed(program.equations, self.makes)]
        self.reads = dataflow.free_variables(kept, self.makes)
        run = jaxprs.as_function(self.reads, kept, self.makes)
        shapes = [jaxprs.shape_of(var) for var in self.reads]
        self._lowered = jit_on(run, placement).lower(*shapes)
        self._compiled: Any = None

    def compile(self) -> None:
        """Compiles it. May be called from another thread."""
        self._compiled = compile_lowered(self._lowered)

    def bind(self, values: Mapping[Var, Any]) -> Callable[[], Sequence[Any]]:
        """A function without arguments that dispatches it."""
        arguments = [values[var] for var in self.reads]
        return lambda: self._compiled(*arguments)

    @property
    def flops(self) -> float:
        """Floating-point operations by XLA's count, the body of a loop once; 0 if unknown."""
        found = self._compiled.cost_analysis()
        if isinstance(found, list):  # one for each device, on some platforms
            found = found[0] if found else None
        return max(float((found or {}).get("flops", 0.0)), 0.0)


def compile_lowered(lowered: Any) -> Any:
    """Compiles a program. Every compilation of this module goes through here."""
    return lowered.compile()


def dispatch_s(placement: Sharding, repeats: int) -> float:
    """Seconds that it takes to dispatch a program that does nothing."""
    zero = jax.device_put(np.zeros((), np.float32), placement)
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = compile_lowered(jit_on(lambda x: x, placement).lower(shape))
    return float(np.median(sample([lambda: compiled(zero)], repeats)))


def sample(calls: Sequence[Callable[[], Any]], repeats: int) -> np.ndarray:
    """Seconds of one call of each of `calls`, several times over.

    Each sample is of as many calls back to back as fill a few milliseconds. The functions take
    turns, so that other load of the machine meets all of them.

    Returns:
        Seconds, ``[repeats, len(calls)]``.
    """
    counts = []
    for call in calls:
        jax.block_until_ready(call())
        counts.append(min(math.ceil(_SAMPLE_S / _seconds(call, 1)), _MAX_CALLS))
    rounds = range(repeats)
    return np.array([[_seconds(*pair) for pair in zip(calls, counts, strict=True)] for _ in rounds])


def _seconds(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    made = None
    for _ in range(count):
        made = call()
    jax.block_until_ready(made)
    return (time.perf_counter() - start) / count


# ---------------------------------------------------------------- made-up inputs


def make_inputs(
    programs: StagePrograms,
    reads: Iterable[Var],
    known: Mapping[Var, Any],
    placement: Sharding,
) -> dict[Var, Any]:
    """Values, in place, for those of `reads` that are inputs or cotangents of a stage.

    Args:
        programs: the stage.
        reads: the values that its passes read.
        known: values to be used in the place of made-up ones.
        placement: where they go.
    """
    rng = np.random.default_rng(0)
    wanted = set(reads)
    given = [var for group in programs.inputs.values() for var in group]
    found: dict[Var, Any] = {
        var: known[var] if var in known else _make_up(jaxprs.shape_of(var), rng)
        for var in (*given, *programs.cotangents)
        if var in wanted
    }
    if programs.seed is not None:
        found[programs.seed] = np.ones((), jaxprs.aval(programs.seed).dtype)
    return dict(zip(found, jax.device_put(tuple(found.values()), placement), strict=True))


def _make_up(shape: jax.ShapeDtypeStruct, rng: np.random.Generator) -> Any:
    """Small random numbers for a real or complex type, zeros for another, and a key for a key."""
    if is_key(shape):
        return jnp.zeros(shape.shape, shape.dtype)
    if not jnp.issubdtype(shape.dtype, jnp.inexact):
        return np.zeros(shape.shape, shape.dtype)
    # A few thousand numbers over and over: drawing a gigabyte of them takes longer than the layer.
    some = rng.normal(0.0, _STEP, 4093).astype(shape.dtype)
    return np.resize(some, shape.shape)


def saved_values(forward: Pass, made: Values, saved: Sequence[Any]) -> dict[Var, Any]:
    """The values for the backward pass, among the results of a forward pass."""
    wanted = set(jaxprs.variables(saved))
    return {var: value for var, value in zip(forward.makes, made, strict=True) if var in wanted}
