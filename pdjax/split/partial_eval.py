"""Loops and branches, taken apart by what their results depend on.

One equation for a whole loop makes all of its results depend on all of its inputs. After
differentiation, that of a loop over layers hands out the cast weights of every layer beside the
activations, and they would be stored like these. `partial_eval` gives the results that are made of
parameters and constants alone (or, in a branch, of the choice and them) an equation of their own,
which the backward pass can run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from pdjax.trace import inline, jaxprs
from pdjax.trace.jaxprs import Atom, Equation, Var


def partial_eval(equations: Sequence[Equation], unknown_inputs: Sequence[Var]) -> list[Equation]:
    """Separates what depends on none of `unknown_inputs` from the loops and branches that hold it.

    Args:
        equations: a program.
        unknown_inputs: the inputs of which no result may be made that is to be separated.

    Returns:
        An equal program, with the same variables for the same values.
    """
    unknown = set(unknown_inputs)
    result: list[Equation] = []
    for equation in equations:
        rule = _RULES.get(equation.primitive.name)
        parts = rule(equation, unknown) if rule else None
        for part in parts or [equation]:
            result.append(part)
            if not unknown.isdisjoint(jaxprs.variables(part.invars)):
                unknown.update(part.outvars)
    return result


def _split_scan(equation: Equation, unknown: set[Var]) -> list[Equation] | None:
    closed = equation.params["jaxpr"]
    body = closed.jaxpr
    num_consts, num_carry = jaxprs.scan_layout(equation)
    loose = _independent(body, body.outvars, _free_inputs(body.invars, equation.invars, unknown))
    carried = set(body.invars[num_consts : num_consts + num_carry])
    wanted = [
        at
        for at in range(num_carry, len(body.outvars))
        if at in loose and not _inputs_of(body, body.outvars[at]) & carried
    ]
    if not wanted or _nothing_else(equation, unknown):
        return None
    step = _restricted(closed, wanted)

    def run(*operands: Any) -> Any:
        consts, rest = operands[:num_consts], operands[num_consts:]

        def one(carry: Any, xs: Any) -> Any:
            return carry, step(*consts, *rest[:num_carry], *xs)

        loop = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
        return jax.lax.scan(one, (), rest[num_carry:], **loop)[1]

    return _with_own_equation(equation, wanted, run)


def _split_cond(equation: Equation, unknown: set[Var]) -> list[Equation] | None:
    branches = equation.params["branches"]
    wanted = set(range(len(equation.outvars)))
    for closed in branches:
        free = _free_inputs(closed.jaxpr.invars, equation.invars[1:], unknown)
        wanted &= _independent(closed.jaxpr, closed.jaxpr.outvars, free)
    if not wanted or _nothing_else(equation, unknown):
        return None
    chosen = sorted(wanted)
    runs = [_restricted(closed, chosen) for closed in branches]
    return _with_own_equation(
        equation, chosen, lambda index, *operands: jax.lax.switch(index, runs, *operands)
    )


_RULES: dict[str, Callable[[Equation, set[Var]], list[Equation] | None]] = {
    "scan": _split_scan,
    "cond": _split_cond,
}


def _free_inputs(inner: Sequence[Var], outer: Sequence[Atom], unknown: set[Var]) -> set[Var]:
    """The inner inputs whose outer values depend on no root."""
    pairs = zip(inner, outer, strict=True)
    return {var for var, atom in pairs if unknown.isdisjoint(jaxprs.variables([atom]))}


def _independent(body: Any, outvars: Sequence[Atom], free: set[Var]) -> set[int]:
    """Positions of the results that are made of nothing but `free` inputs and constants."""
    return {at for at, atom in enumerate(outvars) if _inputs_of(body, atom) <= free}


def _inputs_of(body: Any, atom: Atom) -> set[Var]:
    kept = [body.eqns[i] for i in jaxprs.needed(body.eqns, [atom])]
    return set(jaxprs.free_variables(kept, [atom])) & set(body.invars)


def _nothing_else(equation: Equation, unknown: set[Var]) -> bool:
    """Whether the equation depends on no root anyway, or must not run twice."""
    return unknown.isdisjoint(jaxprs.variables(equation.invars)) or jaxprs.has_effects(equation)


def _restricted(closed: Any, wanted: Sequence[int]) -> Callable[..., list[Any]]:
    """The function of a jaxpr, for some of its results only."""
    body = closed.jaxpr
    outvars = [body.outvars[at] for at in wanted]
    kept = [body.eqns[i] for i in jaxprs.needed(body.eqns, outvars)]
    run = jaxprs.as_function([*body.constvars, *body.invars], kept, outvars)
    return lambda *values: run(*closed.consts, *values)


def _with_own_equation(
    equation: Equation, wanted: Sequence[int], run: Callable[..., Any]
) -> list[Equation]:
    """The equation, and others in front of it that make its results `wanted` by `run`."""
    # A result that is an operand handed through gets an equation, too: one that costs nothing.
    program, _ = inline.trace(
        lambda *operands: jax.tree.map(jax.lax.stop_gradient, run(*operands)),
        *map(jaxprs.shape_of, equation.invars),
    )
    if program.constvars:
        return [equation]
    names: dict[Var, Atom] = dict(zip(program.invars, equation.invars, strict=True))
    made = zip(program.outvars, (equation.outvars[at] for at in wanted), strict=True)
    aliases = {inner: outer for inner, outer in made if isinstance(inner, Var)}
    if len(aliases) < len(wanted) or aliases.keys() & names.keys():
        return [equation]
    renamed = [jaxprs.renamed(inner, {**names, **aliases}) for inner in program.equations]
    unused = [
        jaxprs.fresh(var.aval) if at in wanted else var for at, var in enumerate(equation.outvars)
    ]
    return [*renamed, equation.replace(outvars=unused)]
