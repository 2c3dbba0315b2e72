"""Traced programs with their nested calls inlined.

Nested `jit` equations are inlined, so that a cut may fall between any two of the primitive
operations, and every value gets a variable of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex
from jax.extend.core import primitives

from pdjax.trace import dataflow, jaxprs
from pdjax.trace.dataflow import DataFlow
from pdjax.trace.jaxprs import Atom, Equation, Var

_REMATERIALISED = frozenset({"checkpoint", "remat", "remat2"})


@dataclass(frozen=True, eq=False)
class InlinedProgram:
    """A traced function without nested `jit`.

    Attributes:
        invars: one variable for each flat input.
        constvars: one variable for each array that the function closed over.
        consts: the values of `constvars`.
        equations: the equations, in program order.
        paths: for each equation the named scopes that it was traced in, such as
            ``"block_0/Dense_1"``; empty where there were none.
        outvars: one variable or literal for each flat output.
    """

    invars: tuple[Var, ...]
    constvars: tuple[Var, ...]
    consts: tuple[Any, ...]
    equations: tuple[Equation, ...]
    paths: tuple[str, ...]
    outvars: tuple[Atom, ...]

    @cached_property
    def flow(self) -> DataFlow:
        """The data flow of the equations."""
        return DataFlow(self.equations)


class _Inliner:
    """Copies a jaxpr equation by equation, with fresh variables, descending into nested ones."""

    def __init__(
        self, branches_as_selects: bool = False, inlined: frozenset[str] = jaxprs.INLINED
    ) -> None:
        self.branches_as_selects = branches_as_selects
        self.inlined = inlined
        self.equations: list[Equation] = []
        self.paths: list[str] = []
        self.consts: dict[int, tuple[Var, Any]] = {}

    def run(self, closed: jex.ClosedJaxpr, inputs: Sequence[Atom], scope: str) -> list[Atom]:
        jaxpr = closed.jaxpr
        env: dict[Var, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
            env[var] = self.consts.setdefault(id(value), (jaxprs.fresh(var.aval), value))[0]

        def read(atom: Atom) -> Atom:
            return atom if isinstance(atom, jex.Literal) else env[atom]

        for equation in jaxpr.eqns:
            arguments = [read(atom) for atom in equation.invars]
            path = _join(scope, jaxprs.scope_path(equation))
            if equation.primitive.name in self.inlined and not jaxprs.has_shardings(equation):
                results = self.run(_called(equation), arguments, path)
            elif equation.primitive.name == "cond" and self.branches_as_selects:
                results = self._select(equation, arguments, path)
            else:
                results = [jaxprs.fresh(var.aval) for var in equation.outvars]
                self.equations.append(equation.replace(invars=arguments, outvars=results))
                self.paths.append(path)
            env.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _select(self, equation: Equation, arguments: list[Atom], path: str) -> list[Atom]:
        """Runs every branch of a cond and selects among their results."""
        index, *operands = arguments
        branches = [self.run(closed, operands, path) for closed in equation.params["branches"]]
        results = [jaxprs.fresh(var.aval) for var in equation.outvars]
        for result, *cases in zip(results, *branches, strict=True):
            self.equations.append(
                jex.new_jaxpr_eqn(
                    [index, *cases], [result], primitives.select_n_p, {}, jex.no_effects
                )
            )
            self.paths.append(path)
        return list(results)


def inline_jaxpr(closed: jex.ClosedJaxpr, *, branches_as_selects: bool = False) -> InlinedProgram:
    """Inlines the nested `jit` equations of `closed` and renames every variable apart.

    With `branches_as_selects`, a `cond` becomes all of its branches and a selection, so that each
    of its results depends on no more than it must.
    """
    inliner = _Inliner(branches_as_selects)
    invars = [jaxprs.fresh(var.aval) for var in closed.jaxpr.invars]
    outvars = inliner.run(closed, invars, "")
    constvars, consts = zip(*inliner.consts.values(), strict=True) if inliner.consts else ((), ())
    return InlinedProgram(
        tuple(invars),
        constvars,
        consts,
        tuple(inliner.equations),
        tuple(inliner.paths),
        tuple(outvars),
    )


def inline_equations(
    equations: Sequence[Equation], outvars: Sequence[Atom]
) -> tuple[tuple[Equation, ...], list[Atom]]:
    """Inlines nested `jit` and `jax.checkpoint`; loops and branches stay one equation each.

    Args:
        equations: a program.
        outvars: values that are wanted of it.

    Returns:
        An equal program that reads the same variables and makes others, and its names for
        `outvars`.
    """
    reads = dataflow.free_variables(equations, outvars)
    inliner = _Inliner(inlined=jaxprs.INLINED | _REMATERIALISED)
    names = inliner.run(jaxprs.closed(reads, equations, outvars), reads, "")
    return _with_literals(inliner.equations, names, dict(inliner.consts.values()))


def consts_to_literals(program: InlinedProgram) -> InlinedProgram:
    """The same program with the arrays that it closed over as literals of its equations."""
    constants = dict(zip(program.constvars, program.consts, strict=True))
    equations, outvars = _with_literals(program.equations, program.outvars, constants)
    return replace(program, constvars=(), consts=(), equations=equations, outvars=tuple(outvars))


def _with_literals(
    equations: Sequence[Equation], outvars: Sequence[Atom], constants: Mapping[Var, Any]
) -> tuple[tuple[Equation, ...], list[Atom]]:
    names: dict[Var, Atom] = {
        var: jex.Literal(value, jaxprs.aval(var)) for var, value in constants.items()
    }
    return tuple(jaxprs.renamed(equation, names) for equation in equations), jaxprs.read(
        outvars, names
    )


def eliminate_common(
    equations: Sequence[Equation], outvars: Sequence[Atom]
) -> tuple[tuple[Equation, ...], list[Atom]]:
    """Common subexpression elimination: runs equal equations once.

    Equations that are equal but for nested programs of their own stay apart. Returns an equal
    program and its names for `outvars`, as `inline_equations` does.
    """
    names: dict[Var, Atom] = {}
    known: dict[Any, list[Equation]] = {}
    for equation in equations:
        new = jaxprs.renamed(equation, names)
        alike = known.setdefault((new.primitive, *map(_identity, new.invars)), [])
        twin = next((old for old in alike if _equal_parameters(old, new)), None)
        if twin is None or jaxprs.has_effects(new):
            alike.append(new)
        else:
            names |= zip(new.outvars, twin.outvars, strict=True)
    kept = (jaxprs.renamed(e, names) for e in equations if names.keys().isdisjoint(e.outvars))
    return tuple(kept), jaxprs.read(outvars, names)


def trace(
    function: Callable[..., Any], *args: Any, branches_as_selects: bool = False
) -> tuple[InlinedProgram, Any]:
    """Traces `function` at the shapes of `args`; returns the program and its output structure."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    flat = inline_jaxpr(closed, branches_as_selects=branches_as_selects)
    return flat, jax.tree.structure(shapes)


def _identity(atom: Atom) -> Any:
    """A key that is equal for two reads of one value."""
    if not isinstance(atom, jex.Literal):
        return atom
    value = atom.val
    return (jaxprs.aval(atom).str_short(), repr(value) if np.ndim(value) == 0 else id(value))


def _equal_parameters(one: Equation, other: Equation) -> bool:
    try:
        return bool(one.params == other.params)
    except ValueError:  # of arrays
        return False


def _join(outer: str, inner: str) -> str:
    return f"{outer}/{inner}" if outer and inner else outer or inner


def _called(equation: Equation) -> jex.ClosedJaxpr:
    inner: Any = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if hasattr(inner, "consts"):
        return inner
    return jex.ClosedJaxpr(inner, ())
