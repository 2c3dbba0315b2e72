"""A piece of a traced function that can be run: equations and what is wanted of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pdjax.trace import jaxprs
from pdjax.trace.jaxprs import Atom, Equation, Var


@dataclass(frozen=True, eq=False)
class Program:
    """Equations with named groups of outputs.

    Attributes:
        equations: what to run, in order.
        outputs: for each group its values; one value may be in several groups.
    """

    equations: tuple[Equation, ...] = field(repr=False)
    outputs: dict[str, tuple[Atom, ...]]

    @cached_property
    def reads(self) -> tuple[Var, ...]:
        """The variables that must be given."""
        outvars = [atom for group in self.outputs.values() for atom in group]
        return tuple(jaxprs.free_variables(self.equations, outvars))

    def run(self, values: Mapping[Any, Any]) -> dict[str, tuple[Any, ...]]:
        """Computes the outputs from the values of (at least) `reads`."""
        outvars = jaxprs.variables(atom for group in self.outputs.values() for atom in group)
        function = jaxprs.as_function(self.reads, self.equations, outvars)
        made = dict(zip(outvars, function(*(values[var] for var in self.reads)), strict=True))
        return {
            name: tuple(made[atom] if isinstance(atom, Var) else atom.val for atom in group)
            for name, group in self.outputs.items()
        }
