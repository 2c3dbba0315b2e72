"""A piece of a traced function that can be run: equations and named groups of outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pdjax.trace import dataflow, jaxprs
from pdjax.trace.jaxprs import Atom, Equation, Var


@dataclass(frozen=True, eq=False)
class Program:
    """Equations with named groups of outputs.

    Attributes:
        equations: the equations, in program order.
        outputs: for each group its values; one value may be in several groups.
    """

    equations: tuple[Equation, ...] = field(repr=False)
    outputs: dict[str, tuple[Atom, ...]]

    @cached_property
    def reads(self) -> tuple[Var, ...]:
        """The variables that the program takes, in order of first use."""
        outvars = [atom for group in self.outputs.values() for atom in group]
        return tuple(dataflow.free_variables(self.equations, outvars))

    def run(self, values: Mapping[Any, Any]) -> dict[str, tuple[Any, ...]]:
        """Computes the outputs from the values of (at least) `reads`."""
        outvars = jaxprs.variables(atom for group in self.outputs.values() for atom in group)
        function = jaxprs.as_function(self.reads, self.equations, outvars)
        results = function(*(values[var] for var in self.reads))
        result_of = dict(zip(outvars, results, strict=True))
        return {
            name: tuple(result_of[atom] if isinstance(atom, Var) else atom.val for atom in group)
            for name, group in self.outputs.items()
        }


def sliced(
    equations: Sequence[Equation],
    outputs: dict[str, tuple[Atom, ...]],
    given: Iterable[Var] = (),
    effects: bool = False,
) -> Program:
    """The program that makes `outputs`, with the equations that these need.

    Args:
        equations: a program.
        outputs: for each group of outputs its values.
        given: values that the slice reads rather than makes.
        effects: whether equations with a side effect are kept, with the equations that they need.
    """
    observers = [i for i, e in enumerate(equations) if jaxprs.has_effects(e)] if effects else []
    wanted = [atom for group in outputs.values() for atom in group]
    wanted += [atom for i in observers for atom in equations[i].invars]
    kept = {*dataflow.needed(equations, wanted, given), *observers}
    return Program(tuple(equations[i] for i in sorted(kept)), outputs)
