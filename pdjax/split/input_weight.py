"""The backward pass of a stage in two parts, for schedules that fill the bubble with the second.

Whoever waits for a stage's backward pass waits for its cotangents only. So the backward pass is
sliced by its outputs (zero-bubble pipelines, arXiv:2401.10241, section 2, which writes B for what
is I here):

    I   the input part    makes the cotangents for the values that the stage received
    W   the weight part   makes the gradients of its parameters, any time later

Every equation is in one of the two. What both need is in I, and W reads what I made of it: such
values are *held* from one to the other, beside those of the forward pass's saved values that W
reads. Equations that depend on nothing but parameters and constants are the exception: both parts
run those that they need, since a cast or transposed weight would be held for every microbatch.

Nested `jit` and `jax.checkpoint` are inlined first, so that the slice goes through them. A loop or
a branch stays whole: what makes the cotangents of a loop over layers makes the gradients, too, and
these are I's to add up, rather than held as gradients of one microbatch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdjax.split.differentiate import StagePrograms
from pdjax.trace import inline, jaxprs
from pdjax.trace.jaxprs import Atom, Equation, Var
from pdjax.trace.program import Program


@dataclass(frozen=True, eq=False)
class InputWeightSplit:
    """What the two parts of a backward pass compute for one microbatch.

    Attributes:
        input_part: reads inputs, ``saved``, cotangents and the seed; makes ``receives``, as the
            whole backward pass does, ``held``, values that the weight part reads, and ``params``,
            the gradients of the parameters `early`.
        weight_part: reads inputs, those of ``saved`` in `kept`, ``held`` and the seed; makes
            ``params``, the gradients of the parameters `late`.
        early: positions among the stage's parameters of those whose gradient the input part has.
        late: positions of the others.
        kept: positions among the forward pass's ``saved`` of those that the weight part reads.
        kept_bytes: their size, for one microbatch.
    """

    input_part: Program
    weight_part: Program
    early: tuple[int, ...]
    late: tuple[int, ...]
    kept: tuple[int, ...]
    kept_bytes: int

    @property
    def held_bytes(self) -> int:
        """Bytes that wait for the weight part for each microbatch, the weights not counted."""
        return self.kept_bytes + sum(map(jaxprs.num_bytes, self.input_part.outputs["held"]))


def split_input_weight(programs: StagePrograms) -> InputWeightSplit:
    """Divides the backward pass of a stage into its input part and its weight part.

    Of a stage that sends no cotangents back all is in the weight part.

    Args:
        programs: what the stage computes for one microbatch. It stays as it is.
    """
    equations, gradients, receives = _inlined(programs.backward)
    saved = programs.forward.outputs["saved"]
    inputs = programs.inputs
    own = [name for name in inputs if name not in ("params", "consts")]
    line = _line(
        equations, [*programs.cotangents, *saved, *(var for name in own for var in inputs[name])]
    )
    slicing = _Slicing(equations, programs.cotangents, line)
    slicing.add_input_part(receives)
    early = [at for at, atom in enumerate(gradients) if receives and slicing.has_early(atom)]
    slicing.add_input_part([gradients[at] for at in early])
    late = [at for at in range(len(gradients)) if at not in early]
    slicing.add_weight_part([gradients[at] for at in late])
    slicing.add_observers()
    second = Program(slicing.weight_part, {"params": tuple(gradients[at] for at in late)})
    read = set(second.reads)
    outputs = {
        "params": tuple(gradients[at] for at in early),
        "receives": tuple(receives),
        "held": tuple(var for var in slicing.at_hand if var in read),
    }
    kept = tuple(at for at, var in enumerate(saved) if var in read)
    return InputWeightSplit(
        input_part=Program(slicing.input_part, outputs),
        weight_part=second,
        early=tuple(early),
        late=tuple(late),
        kept=kept,
        kept_bytes=sum(jaxprs.num_bytes(saved[at]) for at in kept),
    )


def _inlined(backward: Program) -> tuple[tuple[Equation, ...], list[Atom], list[Atom]]:
    """The equations of a backward pass, inlined, and its gradients and cotangents there."""
    gradients, receives = backward.outputs["params"], backward.outputs["receives"]
    equations, outvars = inline.inline_equations(backward.equations, [*gradients, *receives])
    # Equations that `jax.checkpoint` kept apart from equal ones would let one part repeat another.
    equations, outvars = inline.eliminate_common(equations, outvars)
    return equations, outvars[: len(gradients)], outvars[len(gradients) :]


def _line(equations: Sequence[Equation], roots: Iterable[Atom]) -> set[Var]:
    """The values that differ from one microbatch to the next.

    These are `roots`, what is made of them, and what comes of a side effect.
    """
    line = set(jaxprs.variables(roots))
    for equation in equations:
        if jaxprs.has_effects(equation) or not line.isdisjoint(jaxprs.variables(equation.invars)):
            line.update(equation.outvars)
    return line


class _Slicing:
    """Assigns the equations of a backward pass to its parts.

    Attributes:
        at_hand: the values that the input part has and the weight part need not make, in order:
            cotangents, and what it makes itself and is not made of parameters and constants alone.
    """

    def __init__(
        self, equations: Sequence[Equation], cotangents: Sequence[Var], line: set[Var]
    ) -> None:
        self._equations = equations
        self._cotangents = cotangents
        self._line = line
        self._first: set[int] = set()
        self._second: set[int] = set()
        self.at_hand: dict[Var, None] = dict.fromkeys(cotangents)

    @property
    def input_part(self) -> tuple[Equation, ...]:
        """The equations of the input part, in program order."""
        return tuple(self._equations[i] for i in sorted(self._first))

    @property
    def weight_part(self) -> tuple[Equation, ...]:
        """The equations of the weight part, in program order."""
        return tuple(self._equations[i] for i in sorted(self._second))

    def add_input_part(self, wanted: Iterable[Atom]) -> None:
        """Has the input part make `wanted`."""
        self._run_first(jaxprs.needed(self._equations, wanted))

    def add_weight_part(self, wanted: Iterable[Atom]) -> None:
        """Has the weight part make `wanted`, of what the input part has if possible."""
        self._second.update(jaxprs.needed(self._equations, wanted, self.at_hand))

    def has_early(self, gradient: Atom) -> bool:
        """Whether the input part has a gradient, or has it but for its shape and type.

        It has one that is literally one of its values, and one that comes out of a loop or a
        branch that it runs. Of the latter, what follows it (a cast, a sum with a weight decay)
        is left to the input part too: else an array of the size of the weights would be held.
        """
        if not isinstance(gradient, Var):
            return False
        if gradient in self.at_hand:
            return True
        rest = [
            self._equations[i] for i in jaxprs.needed(self._equations, [gradient], self.at_hand)
        ]
        whole = {var for e in self.input_part if jaxprs.subprograms(e) for var in e.outvars}
        reads = jaxprs.free_variables(rest, [gradient])
        return not whole.isdisjoint(reads) and all(map(self._reshapes, rest))

    def add_observers(self) -> None:
        """Has equations that are there for their side effect run, once.

        In the input part, but for those that see something which only the weight part makes.
        """
        for at, equation in enumerate(self._equations):
            if not jaxprs.has_effects(equation) or at in self._first | self._second:
                continue
            behind = {at, *jaxprs.needed(self._equations, equation.invars, self.at_hand)}
            if any(self._is_of_line(i) for i in behind & self._second):
                self._second |= behind
            else:
                self._run_first(behind)

    def _run_first(self, positions: Iterable[int]) -> None:
        self._first.update(positions)
        made = (var for equation in self.input_part for var in equation.outvars)
        self.at_hand = dict.fromkeys([*self._cotangents, *(v for v in made if v in self._line)])

    def _is_of_line(self, position: int) -> bool:
        return not self._line.isdisjoint(self._equations[position].outvars)

    def _reshapes(self, equation: Equation) -> bool:
        """Whether what the equation makes is a sum, or one value in another form."""
        of_line = self._line.intersection(jaxprs.variables(equation.invars))
        if not of_line or equation.primitive.name == "add_any":
            return True
        return len(of_line) == 1 and jaxprs.is_cheap(equation)
