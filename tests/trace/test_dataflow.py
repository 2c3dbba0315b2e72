"""The walks over equations, against their definitions: what is on a path from here to there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from random_equations import NUM_INPUTS, literal, picks, program, rows, some

from pdjax.trace import dataflow, jaxprs
from pdjax.trace.dataflow import DataFlow
from pdjax.trace.jaxprs import Equation, Var


def edges(equations: Sequence[Equation]) -> set[tuple[int, Var, Var]]:
    """(position, input, result) of every equation."""
    return {
        (at, read, result)
        for at, equation in enumerate(equations)
        for read in jaxprs.variables(equation.invars)
        for result in equation.outvars
    }


def closure(start: Iterable[Var], pairs: Iterable[tuple[Var, Var]]) -> set[Var]:
    """All that is joined to `start` by (from, to), found by trying every pair again and again."""
    found, pairs = set(start), list(pairs)
    while new := {b for a, b in pairs if a in found} - found:
        found |= new
    return found


@settings(max_examples=200, deadline=None)
@given(rows, picks)
def test_makers_readers_and_free_variables(choices, chosen):
    values, equations = program(choices)
    flow = DataFlow(equations)
    for var in values:
        made = [at for at, equation in enumerate(equations) if var in equation.outvars]
        read = [at for at, e in enumerate(equations) if any(var is atom for atom in e.invars)]
        assert [flow.makers[var]] == made if made else var not in flow.makers
        assert flow.readers.get(var, []) == read
    outvars = some(values, chosen)
    atoms = [atom for equation in equations for atom in equation.invars] + outvars
    in_order = [var for var in jaxprs.variables(atoms) if var not in flow.makers]
    assert dataflow.free_variables(equations, outvars) == in_order
    assert set(in_order) <= set(values[:NUM_INPUTS])


@settings(max_examples=300, deadline=None)
@given(rows, picks, st.none() | st.sets(st.integers(0, 99), max_size=8))
def test_reachable_and_sources_are_what_is_on_a_path(choices, chosen, closed):
    """`closed` picks pairs (position, variable) that the walks may not go through."""
    values, equations = program(choices)
    roots = some(values, chosen)
    joints = [(at, v) for at, e in enumerate(equations) for v in (*e.invars[:-1], *e.outvars)]
    shut = {joints[at % len(joints)] for at in closed or () if joints}

    def through(position: int, var: Var) -> bool:
        return (position, var) not in shut

    flow, filtered = DataFlow(equations), None if closed is None else through
    forward = {(read, made) for at, read, made in edges(equations) if through(at, made)}
    assert flow.reachable(roots, filtered) == closure(roots, forward)
    backward = {(made, read) for at, read, made in edges(equations) if through(at, read)}
    assert flow.sources([*roots, literal()], filtered) == closure(roots, backward)
    if closed is None:
        assert dataflow.reachable(equations, roots) == closure(roots, forward)


@settings(max_examples=300, deadline=None)
@given(rows, picks, picks)
def test_needed_equations_make_what_is_wanted_and_none_is_idle(choices, chosen, known):
    values, equations = program(choices)
    wanted, given_values = some(values, chosen), some(values, known)
    positions = dataflow.needed(equations, [*wanted, literal()], given_values)
    pairs = {(made, read) for _, read, made in edges(equations) if made not in given_values}
    behind = closure(set(wanted) - set(given_values), pairs) - set(given_values)
    assert positions == [at for at, e in enumerate(equations) if behind & set(e.outvars)]
    kept = [equations[at] for at in positions]
    reads = dataflow.free_variables(kept, wanted)
    assert set(reads) <= {*values[:NUM_INPUTS], *given_values}  # so that it can be run


@settings(max_examples=200, deadline=None)
@given(rows)
def test_facts_are_those_of_the_inputs_behind_a_value(choices):
    """The fact here: the inputs that a value depends on. A result of no inputs has none of it."""
    values, equations = program(choices)
    start = {var: frozenset([var]) for var in values[:NUM_INPUTS]}
    facts = DataFlow(equations).propagate(
        start, lambda _, reads: frozenset().union(*reads.values()) if reads else None
    )
    flow = DataFlow(equations)
    for var in values:
        assert facts.get(var, frozenset()) == flow.sources([var]) & set(start)


def test_every_equation_is_visited_once():
    """A line of diamonds has 2^n paths; the walks ask once about each value at each equation.

    Every equation reads a value, and every second one makes one, that the walks may not enter.
    """
    last, size, choices, closed = 0, NUM_INPUTS, [], {1}
    for _ in range(500):  # two values made of the one before, and one made of both
        choices += [([last, 1], 2), ([size, size + 1, 1], 2)]
        last, size = size + 2, size + 4
        closed.add(size - 1)
    values, equations = program(choices)
    closed_values = {values[at] for at in closed}
    for walk, start in (("reachable", values[0]), ("sources", values[last])):
        visits: Counter[tuple[int, Var]] = Counter()

        def count(position: int, var: Var, visits: Counter[tuple[int, Var]] = visits) -> bool:
            visits[position, var] += 1
            return var not in closed_values

        found = getattr(DataFlow(equations), walk)([start], count)
        assert len(found) == 3 * 500 + 1
        assert max(visits.values()) == 1
