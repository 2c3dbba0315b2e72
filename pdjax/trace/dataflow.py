"""Data flow: the maker and the readers of a value, and the values that depend on each other.

A program is a list of equations in program order, and every value is made once (as in a jaxpr):

    position   equation        makers       readers
       0       b = f a         b: 0         a: [0]
       1       c = g b         c: 1         b: [1, 2]
       2       d = h b         d: 2         c: [3]
       3       e = k c x       e: 3         x: [3]

    reachable from c    {c, e}             forward: the values computed with it
    sources of e        {e, c, x, b, a}    backward: the values that it is computed with
    needed for e        [0, 1, 3]          the positions of the equations that compute it

`DataFlow` holds the two tables of one program, for many questions about it: each table takes time
linear in the program, and each walk takes time linear in the equations that it visits. The
functions of the same names ask one question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from pdjax.trace.jaxprs import Atom, Equation, Var, variables

Through = Callable[[int, Var], bool]
"""Whether a walk goes through an equation, given by its position, on to one of its values."""

Fact = TypeVar("Fact")


@dataclass(frozen=True, eq=False)
class DataFlow:
    """The data flow of one program.

    Attributes:
        equations: the program.
    """

    equations: Sequence[Equation]

    @cached_property
    def makers(self) -> dict[Var, int]:
        """For each value that is not an input, the position of the equation that makes it."""
        return makers(self.equations)

    @cached_property
    def readers(self) -> dict[Var, list[int]]:
        """For each value that is read, the positions of the equations that read it, ascending."""
        found: dict[Var, list[int]] = {}
        for position, inputs in enumerate(self.inputs):
            for var in inputs:
                found.setdefault(var, []).append(position)
        return found

    @cached_property
    def inputs(self) -> list[list[Var]]:
        """For each equation the distinct variables that it reads."""
        return [variables(equation.invars) for equation in self.equations]

    def reachable(self, roots: Iterable[Var], through: Through | None = None) -> set[Var]:
        """`roots` and the values that are computed with them.

        Args:
            roots: inputs or values of the program.
            through: a filter: a walk enters a result of an equation only where it holds. Without
                it, every result of an equation depends on everything that the equation reads.
        """
        found, visited = set(roots), set()
        pending = list(found)
        while pending:
            for position in self.readers.get(pending.pop(), ()):
                if position not in visited:
                    visited.add(position)
                    results = self.equations[position].outvars
                    pending += _enter(position, results, found, through)
        return found

    def sources(self, wanted: Iterable[Atom], through: Through | None = None) -> set[Var]:
        """The variables among `wanted` and the values that they are computed with.

        Args:
            wanted: values of the program.
            through: a filter: a walk enters an input of an equation only where it holds.
        """
        found, visited = set(variables(wanted)), set()
        pending = list(found)
        while pending:
            position = self.makers.get(pending.pop())
            if position is not None and position not in visited:
                visited.add(position)
                pending += _enter(position, self.inputs[position], found, through)
        return found

    def needed(self, wanted: Iterable[Atom], given: Iterable[Var] = ()) -> list[int]:
        """Positions of the equations that compute `wanted`, ascending.

        Args:
            wanted: values of the program.
            given: values that are there already: the walk stops at them.
        """
        stop = set(given)
        start = [var for var in variables(wanted) if var not in stop]
        found = self.sources(start, lambda _, var: var not in stop)
        return sorted({self.makers[var] for var in found if var in self.makers})

    def propagate(
        self,
        start: Mapping[Var, Fact],
        rule: Callable[[Equation, dict[Var, Fact]], Fact | None],
    ) -> dict[Var, Fact]:
        """Carries a fact about the inputs of the program forward to its values.

        Args:
            start: the fact about each input (or about some).
            rule: the fact about the results of an equation, from the equation and the facts about
                the variables that it reads; None for no fact.

        Returns:
            `start`, and the facts about the values of the program.
        """
        facts = dict(start)
        for equation, inputs in zip(self.equations, self.inputs, strict=True):
            fact = rule(equation, {var: facts[var] for var in inputs if var in facts})
            if fact is not None:
                facts.update(dict.fromkeys(equation.outvars, fact))
        return facts


def _enter(
    position: int, values: Iterable[Var], found: set[Var], through: Through | None
) -> list[Var]:
    """Adds those of `values` to `found` that a walk enters now, and returns them."""
    new = [v for v in values if v not in found and (through is None or through(position, v))]
    found.update(new)
    return new


def makers(equations: Sequence[Equation]) -> dict[Var, int]:
    """For each value that is not an input, the position of the equation that makes it."""
    return {var: at for at, equation in enumerate(equations) for var in equation.outvars}


def readers(equations: Sequence[Equation]) -> dict[Var, list[int]]:
    """For each value that is read, the positions of the equations that read it, ascending."""
    return DataFlow(equations).readers


def reachable(equations: Sequence[Equation], roots: Iterable[Var]) -> set[Var]:
    """`roots` and the values that are computed with them."""
    return DataFlow(equations).reachable(roots)


def needed(
    equations: Sequence[Equation], wanted: Iterable[Atom], given: Iterable[Var] = ()
) -> list[int]:
    """Positions of the equations that compute `wanted`, ascending, stopping at `given`."""
    return DataFlow(equations).needed(wanted, given)


def free_variables(equations: Sequence[Equation], outvars: Iterable[Atom] = ()) -> list[Var]:
    """The variables that `equations` and `outvars` read and no equation makes, in that order."""
    results = makers(equations)
    atoms = [atom for equation in equations for atom in equation.invars]
    return [var for var in variables([*atoms, *outvars]) if var not in results]


def reads_any(equation: Equation, values: set[Var]) -> bool:
    """Whether an equation reads one of `values`."""
    return not values.isdisjoint(variables(equation.invars))
