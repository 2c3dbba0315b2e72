"""What the passes of a stage are given, and the variables of the stage's programs it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pdjax.split.differentiate import StagePrograms
from pdjax.trace import jaxprs
from pdjax.trace.jaxprs import Atom
from pdjax.trace.jit import Values, total
from pdjax.trace.program import Program


class Given(NamedTuple):
    """What a pass reads besides weights and activations; what it does not read is left empty.

    Attributes:
        consts: the arrays that the loss function closed over.
        state: the mutable state.
        batch: the batch leaves of the microbatch.
        key: the base key.
        number: the global number of the microbatch, if the key is read.
    """

    consts: Values = ()
    state: Values = ()
    batch: Values = ()
    key: Values = ()
    number: Values = ()


class Reads(NamedTuple):
    """Which groups of `Given` a pass reads.

    The others are left empty, so that nothing keeps them alive.
    """

    consts: bool
    state: bool
    batch: bool
    key: bool


def restricted(given: Given, reads: Reads) -> Given:
    """`given` without what a pass that reads `reads` does not read."""
    return Given(
        given.consts if reads.consts else (),
        given.state if reads.state else (),
        given.batch if reads.batch else (),
        given.key if reads.key else (),
        given.number if reads.key else (),
    )


class StageInputs:
    """The inputs of a stage's passes: their shapes, and their values by variable."""

    def __init__(self, programs: StagePrograms) -> None:
        self._programs = programs

    def reads(self, program: Program) -> Reads:
        """Which groups of `Given` a program of the stage reads."""
        read = set(program.reads)
        inputs = self._programs.inputs
        return Reads(**{name: not read.isdisjoint(inputs[name]) for name in Reads._fields})

    def values(self, weights: Values, given: Given) -> dict[Atom, Any]:
        """The values of the stage's inputs other than those it receives."""
        inputs = self._programs.inputs
        values: dict[Atom, Any] = {}
        values |= zip(inputs["params"], weights, strict=True)
        if given.consts:
            values |= zip(inputs["consts"], given.consts, strict=True)
        if given.state:
            values |= zip(inputs["state"], given.state, strict=True)
        if given.batch:
            values |= zip(inputs["batch"], given.batch, strict=True)
        if given.key:
            values[inputs["key"][0]] = jax.random.fold_in(given.key[0], given.number[0])
        return values

    def seed(self) -> dict[Atom, Any]:
        """The cotangent of the loss, if the stage makes it."""
        seed = self._programs.seed
        return {} if seed is None else {seed: jnp.ones((), jaxprs.aval(seed).dtype)}

    def received(self, values: Values) -> dict[Atom, Any]:
        """The values that the stage receives, by variable."""
        return dict(zip(self._programs.inputs["receives"], values, strict=True))

    def saved(self, values: Values) -> dict[Atom, Any]:
        """What the forward pass saved, by variable."""
        return dict(zip(self._programs.forward.outputs["saved"], values, strict=True))

    def cotangents(self, parts: Sequence[Values]) -> dict[Atom, Any]:
        """The cotangents by variable; of each are given the parts that came from later stages."""
        return dict(zip(self._programs.cotangents, map(total, parts), strict=True))

    def shapes(self, group: str) -> Values:
        """The shapes of the inputs of a group."""
        return shapes(self._programs.inputs[group])

    def given_shapes(self, reads: Reads, key: Any) -> Given:
        """The shapes of what a pass is given that reads `reads`; `key` is that of the base key."""
        number = jax.ShapeDtypeStruct((), jnp.uint32)
        consts, state, batch = map(self.shapes, ("consts", "state", "batch"))
        return restricted(Given(consts, state, batch, (key,), (number,)), reads)

    def cotangent_shapes(self) -> Values:
        """The shapes of the parts of the cotangents."""
        pairs = zip(self._programs.cotangents, self._programs.returners, strict=True)
        return tuple(shapes([var]) * len(returners) for var, returners in pairs)


def shapes(group: Sequence[Atom]) -> Values:
    """The shapes of some values."""
    return tuple(map(jaxprs.shape_of, group))
