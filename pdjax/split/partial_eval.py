"""Partial evaluation of loops and branches: their known results get equations of their own.

One equation for a whole loop makes all of its results depend on all of its inputs. After
differentiation, that of a loop over layers hands out the cast weights of every layer beside the
activations, and they would be stored like these:

    w16, y = scan[w16 = cast w; y = tanh(x w16)](w, x)      w known, x unknown

As in JAX's partial evaluation, a value is *known* here if it depends on parameters and constants
alone (or, in a branch, on the choice and them), and *unknown* otherwise. `partial_eval` computes
the known results by an equation in front, which the backward pass can run again:

    w16 = scan[w16 = cast w](w)
    _, y = scan[w16 = cast w; y = tanh(x w16)](w, x)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from pdjax.trace import dataflow, inline, jaxprs
from pdjax.trace.jaxprs import Atom, Equation, Var


def partial_eval(equations: Sequence[Equation], unknown_inputs: Sequence[Var]) -> list[Equation]:
    """Separates the known results of loops and branches from the unknown ones.

    Args:
        equations: a program.
        unknown_inputs: the inputs that are unknown; the others are known.

    Returns:
        An equal program, with the same variables for the same values.
    """
    unknown = set(unknown_inputs)
    result: list[Equation] = []
    for equation in equations:
        for part in _evaluated(equation, unknown):
            result.append(part)
            if dataflow.reads_any(part, unknown):
                unknown.update(part.outvars)
    return result


def _evaluated(equation: Equation, unknown: set[Var]) -> list[Equation]:
    """An equation, after others that make its known results if that takes only a part of it."""
    rule = _RULES.get(equation.primitive.name)
    all_known = not dataflow.reads_any(equation, unknown)
    if rule is None or all_known or jaxprs.has_effects(equation):
        return [equation]
    return rule(equation, unknown)


def _split_scan(equation: Equation, unknown: set[Var]) -> list[Equation]:
    """A result of the loop is known if it depends on no unknown input and on no carried value."""
    closed = equation.params["jaxpr"]
    body = closed.jaxpr
    num_consts, num_carry = jaxprs.scan_layout(equation)
    carried = body.invars[num_consts : num_consts + num_carry]
    known = _known_results(body, [*_unknown(body.invars, equation.invars, unknown), *carried])
    wanted = [at for at in known if at >= num_carry]
    if not wanted:
        return [equation]
    step = _restricted(closed, wanted)

    def run(*operands: Any) -> Any:
        consts, rest = operands[:num_consts], operands[num_consts:]

        def one(carry: Any, xs: Any) -> Any:
            return carry, step(*consts, *rest[:num_carry], *xs)

        loop = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
        return jax.lax.scan(one, (), rest[num_carry:], **loop)[1]

    return _with_own_equation(equation, wanted, run)


def _split_cond(equation: Equation, unknown: set[Var]) -> list[Equation]:
    """A result of the branches is known if it is in each of them; the choice may be unknown."""
    branches = equation.params["branches"]
    known = set(range(len(equation.outvars)))
    for closed in branches:
        inside = _unknown(closed.jaxpr.invars, equation.invars[1:], unknown)
        known.intersection_update(_known_results(closed.jaxpr, inside))
    if not known:
        return [equation]
    wanted = sorted(known)
    runs = [_restricted(closed, wanted) for closed in branches]
    return _with_own_equation(
        equation, wanted, lambda index, *operands: jax.lax.switch(index, runs, *operands)
    )


_RULES: dict[str, Callable[[Equation, set[Var]], list[Equation]]] = {
    "scan": _split_scan,
    "cond": _split_cond,
}


def _unknown(inner: Sequence[Var], outer: Sequence[Atom], unknown: set[Var]) -> list[Var]:
    """The inputs of a body whose values outside are unknown."""
    pairs = zip(inner, outer, strict=True)
    return [var for var, atom in pairs if isinstance(atom, Var) and atom in unknown]


def _known_results(body: Any, unknown: Sequence[Var]) -> list[int]:
    """Positions of the results of a body that depend on none of its inputs `unknown`."""
    reached = dataflow.reachable(body.eqns, unknown)
    return [
        at
        for at, atom in enumerate(body.outvars)
        if not isinstance(atom, Var) or atom not in reached
    ]


def _restricted(closed: Any, wanted: Sequence[int]) -> Callable[..., list[Any]]:
    """The function of a jaxpr, for some of its results only."""
    body = closed.jaxpr
    outvars = [body.outvars[at] for at in wanted]
    kept = [body.eqns[i] for i in dataflow.needed(body.eqns, outvars)]
    run = jaxprs.as_function([*body.constvars, *body.invars], kept, outvars)
    return lambda *values: run(*closed.consts, *values)


def _with_own_equation(
    equation: Equation, wanted: Sequence[int], run: Callable[..., Any]
) -> list[Equation]:
    """The equation, after others that make its results `wanted` by `run`."""
    # A result that is an operand handed through gets an equation, too: one that costs nothing.
    program, _ = inline.trace(
        lambda *operands: jax.tree.map(jax.lax.stop_gradient, run(*operands)),
        *map(jaxprs.shape_of, equation.invars),
    )
    if program.constvars:
        return [equation]
    names: dict[Var, Atom] = dict(zip(program.invars, equation.invars, strict=True))
    pairs = zip(program.outvars, (equation.outvars[at] for at in wanted), strict=True)
    aliases = {inner: outer for inner, outer in pairs if isinstance(inner, Var)}
    if len(aliases) < len(wanted) or aliases.keys() & names.keys():
        return [equation]
    renamed = [jaxprs.renamed(inner, {**names, **aliases}) for inner in program.equations]
    unused = [
        jaxprs.fresh(var.aval) if at in wanted else var for at, var in enumerate(equation.outvars)
    ]
    return [*renamed, equation.replace(outvars=unused)]
