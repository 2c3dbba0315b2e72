"""The backward pass of a stage in two parts, for schedules that fill the bubble with the second.

The stage before waits for the cotangents of a backward pass only. So the backward pass is sliced by
its outputs ("Zero Bubble Pipeline Parallelism", arXiv:2401.10241, section 2, which writes B for the
part that is I here):

    I   the input part    makes the cotangents for the values that the stage received
    W   the weight part   makes the gradients of its parameters, any time later

Every equation is in one of the two. An equation that both need is in I, and W reads its results:
such values are *held* from one to the other, beside those of the forward pass's saved values that W
reads. Equations that depend on nothing but parameters and constants are the exception: both parts
run those that they need, since a cast or transposed weight would be held for every microbatch.

The middle stage of three, y = tanh(x w), with the incoming cotangent ȳ:

    ū = ȳ (1 − y²)    both need it       I    held: ū
    x̄ = ū wᵀ          the cotangent      I
    w̄ = xᵀ ū          the gradient       W    reads ū (held) and x (saved)

Nested `jit` and `jax.checkpoint` are inlined first, so that the slice goes through them. A loop or
a branch stays whole: the equation that makes the cotangents of a loop over layers makes the
gradients, too, and these are I's to add up, rather than held as gradients of one microbatch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdjax.split.differentiate import StagePrograms
from pdjax.trace import dataflow, inline, jaxprs
from pdjax.trace.dataflow import DataFlow
from pdjax.trace.jaxprs import Atom, Equation, Var
from pdjax.trace.program import Program


@dataclass(frozen=True, eq=False)
class InputWeightSplit:
    """The two parts of a backward pass, for one microbatch.

    Attributes:
        input_part: reads inputs, ``saved``, cotangents and the seed; makes ``receives``, as the
            whole backward pass does, ``held``, values that the weight part reads, and ``params``,
            the gradients of the parameters `early`.
        weight_part: reads inputs, those of ``saved`` in `kept`, ``held`` and the seed; makes
            ``params``, the gradients of the parameters `late`.
        early: positions among the stage's parameters of those whose gradient the input part has.
        late: positions of the others.
        kept: positions among the forward pass's ``saved`` of the values that the weight part reads.
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
    """Splits the backward pass of a stage into its input part and its weight part.

    If a stage sends no cotangents back, everything is in the weight part.

    Args:
        programs: the programs of the stage. They stay as they are.
    """
    equations, gradients, receives = _inlined(programs.backward)
    saved = programs.forward.outputs["saved"]
    slicing = _Slicing(equations, programs.cotangents, _line_of(equations, programs))
    # 1. The input part makes the cotangents, and the gradients that come out of it on the way.
    slicing.add_input_part(receives)
    early = [at for at, atom in enumerate(gradients) if receives and slicing.has_early(atom)]
    slicing.add_input_part([gradients[at] for at in early])
    # 2. The weight part makes the other gradients, of the results of the input part if possible.
    late = [at for at in range(len(gradients)) if at not in early]
    slicing.add_weight_part([gradients[at] for at in late])
    # 3. Side effects happen once.
    slicing.add_observers()
    # 4. The weight part's inputs say which values are held and which saved values are kept.
    weight_part = Program(slicing.weight_part, {"params": tuple(gradients[at] for at in late)})
    read = set(weight_part.reads)
    outputs = {
        "params": tuple(gradients[at] for at in early),
        "receives": tuple(receives),
        "held": tuple(var for var in slicing.at_hand if var in read),
    }
    kept = tuple(at for at, var in enumerate(saved) if var in read)
    return InputWeightSplit(
        input_part=Program(slicing.input_part, outputs),
        weight_part=weight_part,
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


def _line_of(equations: Sequence[Equation], programs: StagePrograms) -> set[Var]:
    """The values that differ from one microbatch to the next.

    These are all that depends on an input that does, and the results of side effects.
    """
    own = [name for name in programs.inputs if name not in ("params", "consts")]
    roots = [*programs.cotangents, *programs.forward.outputs["saved"]]
    roots += [var for name in own for var in programs.inputs[name]]
    effects = [v for e in equations if jaxprs.has_effects(e) for v in e.outvars]
    return dataflow.reachable(equations, [*jaxprs.variables(roots), *effects])


class _Slicing:
    """Assigns the equations of a backward pass to its parts.

    Attributes:
        at_hand: the values that the input part has and the weight part need not make, in order:
            cotangents, and those of its results that differ from one microbatch to the next.
        of_loops: the results of loops and branches of the input part.
    """

    def __init__(
        self, equations: Sequence[Equation], cotangents: Sequence[Var], line: set[Var]
    ) -> None:
        self._equations = equations
        self._flow = DataFlow(equations)
        self._cotangents = cotangents
        self._line = line
        self._first: set[int] = set()
        self._second: set[int] = set()
        self.at_hand: dict[Var, None] = dict.fromkeys(cotangents)
        self.of_loops: set[Var] = set()

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
        self._run_first(self._flow.needed(wanted))

    def add_weight_part(self, wanted: Iterable[Atom]) -> None:
        """Has the weight part make `wanted`, of the values at hand if possible."""
        self._second.update(self._flow.needed(wanted, self.at_hand))

    def has_early(self, gradient: Atom) -> bool:
        """Whether the input part has a gradient, or has it but for its shape and type.

        It has one that is literally one of its values, and one that comes out of a loop or a
        branch that it runs. In the latter case the equations that follow (a cast, a sum with a
        weight decay) are in the input part too: else an array as large as the weights would be
        held.
        """
        if not isinstance(gradient, Var):
            return False
        if gradient in self.at_hand:
            return True
        rest = [self._equations[i] for i in self._flow.needed([gradient], self.at_hand)]
        reads = dataflow.free_variables(rest, [gradient])
        return not self.of_loops.isdisjoint(reads) and all(map(self._reshapes, rest))

    def add_observers(self) -> None:
        """Has the equations with a side effect run, once.

        In the input part, unless they read a value that only the weight part makes.
        """
        for at, equation in enumerate(self._equations):
            if not jaxprs.has_effects(equation) or at in self._first | self._second:
                continue
            behind = {at, *self._flow.needed(equation.invars, self.at_hand)}
            if any(self._is_of_line(i) for i in behind & self._second):
                self._second |= behind
            else:
                self._run_first(behind)

    def _run_first(self, positions: Iterable[int]) -> None:
        self._first.update(positions)
        equations = self.input_part
        results = (var for equation in equations for var in equation.outvars)
        self.at_hand = dict.fromkeys([*self._cotangents, *(v for v in results if v in self._line)])
        self.of_loops = {v for e in equations if jaxprs.subprograms(e) for v in e.outvars}

    def _is_of_line(self, position: int) -> bool:
        return not self._line.isdisjoint(self._equations[position].outvars)

    def _reshapes(self, equation: Equation) -> bool:
        """Whether an equation makes a sum, or one value in another form."""
        of_line = self._line.intersection(jaxprs.variables(equation.invars))
        if not of_line or equation.primitive.name == "add_any":
            return True
        return len(of_line) == 1 and jaxprs.is_cheap(equation)
