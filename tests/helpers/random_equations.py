"""Random programs: equations whose data flow is all that matters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
from hypothesis import strategies as st
from jax.extend import core as jex
from jax.extend.core import primitives

from pdjax.trace import jaxprs
from pdjax.trace.jaxprs import Equation, Var

NUM_INPUTS = 3
SCALAR = jax.make_jaxpr(lambda x: x)(1.0).jaxpr.invars[0].aval

rows = st.lists(st.tuples(st.lists(st.integers(0, 99), max_size=3), st.integers(0, 3)), max_size=12)
"""For each equation the values that it reads besides a literal, and how many it makes."""

picks = st.lists(st.integers(0, 99), max_size=4)
"""Some of the variables of a program."""


def variable() -> Var:
    return jaxprs.fresh(SCALAR)


def program(choices: Sequence[tuple[list[int], int]]) -> tuple[list[Var], list[Equation]]:
    """The variables, of which the first are inputs, and the equations of a random program."""
    values = [variable() for _ in range(NUM_INPUTS)]
    equations = []
    for reads, count in choices:
        results = [variable() for _ in range(count)]
        invars = [*(values[at % len(values)] for at in reads), literal()]
        equations.append(jex.new_jaxpr_eqn(invars, results, primitives.add_p, {}, jex.no_effects))
        values += results
    return values, equations


def literal() -> jex.Literal:
    return jex.Literal(1.0, SCALAR)


def some(values: Sequence[Var], chosen: Iterable[int]) -> list[Var]:
    return [values[at % len(values)] for at in chosen]
