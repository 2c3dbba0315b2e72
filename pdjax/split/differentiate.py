"""The forward and the backward pass of a stage, as two programs.

A stage is traced once together with its vector-Jacobian product. The equations that depend on an
incoming cotangent are the backward pass. The values of the others that they read are *residuals*,
which wait in the stash of every microbatch in flight. As `jax.vjp` returns them, residuals hold
copies of the weights: `jax.jit` returns an input that is also an output as a new array, and a cast
or transposed weight is a new array anyway. Here a residual is

    an input of the stage      put back in by the caller, from the stashed version of the weights
    made of parameters,        computed again by the backward pass, never stored
    constants, batch or key
    anything else              stored, or computed again by a few element-wise operations out of
                               less (`pdjax.split.min_cut` finds the smallest set to store)

Computing a forward pass again to store less is rematerialisation, as in "Training Deep Nets with
Sublinear Memory Cost" (Chen et al., arXiv:1604.06174, section 4.1: drop the results of cheap
operations, which are the default here; section 4.2: keep the inputs of segments only, which here
are the stages, is ``remat="full"``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import jax

from pdjax.split.min_cut import Repeatable, smallest_stash
from pdjax.split.partial_eval import partial_eval
from pdjax.split.stages import Stage, StageSplit
from pdjax.trace import dataflow, inline, jaxprs
from pdjax.trace.inline import InlinedProgram
from pdjax.trace.jaxprs import Atom, Equation, Var
from pdjax.trace.program import Program, sliced

Remat = Literal["none", "full"] | Callable[..., Any]
"""The values that a backward pass computes again: ``"none"`` (cheap ones only), ``"full"`` (all of
the forward pass), or a `jax.checkpoint` policy (those that it does not save)."""


@dataclass(frozen=True, eq=False)
class StagePrograms:
    """The programs of a stage, for one microbatch.

    Attributes:
        stage: the stage.
        inputs: the variables of its inputs, by group: ``params, consts, state, batch, key,
            receives``, in the order of `Stage`.
        cotangents: a variable for the cotangent of each of `gradient_sends`.
        seed: the variable for the cotangent of the loss, if this stage makes it.
        forward: makes ``sends, state, results`` and ``saved``, the values for the stash.
        backward: reads inputs, ``saved``, cotangents and the seed; makes ``params``, a gradient
            for each parameter, and ``receives``, a cotangent for each of `gradient_receives`.
        fused: makes the outputs of both at once.
        gradient_sends: positions among the stage's sends that get a cotangent back.
        gradient_receives: positions among its receives that send a cotangent back.
        returners: for each of `gradient_sends` the stages that send a cotangent back, ascending.
    """

    stage: Stage
    inputs: dict[str, tuple[Var, ...]]
    cotangents: tuple[Var, ...]
    seed: Var | None
    forward: Program
    backward: Program
    fused: Program
    gradient_sends: tuple[int, ...]
    gradient_receives: tuple[int, ...]
    returners: tuple[tuple[int, ...], ...]

    @property
    def saved_bytes(self) -> int:
        """Bytes that the stash holds for each microbatch in flight, the weights not counted."""
        return sum(map(jaxprs.num_bytes, self.forward.outputs["saved"]))


_GROUPS = ("params", "consts", "state", "batch", "key", "receives")


def differentiate(split: StageSplit, remat: Sequence[Remat]) -> tuple[StagePrograms, ...]:
    """Derives the forward and the backward pass of every stage.

    It goes from the last stage to the first. Where a stage's derivative by a value that it
    receives is always zero (the value was rounded, say), nothing is sent back, and the
    stages before it are derived without that cotangent, as `jax.grad` would: an array of zeros
    in its place would turn infinities there into NaN.

    Args:
        split: the stages.
        remat: for each stage the values that its backward pass computes again.
    """
    returners: dict[Var, list[int]] = {}
    from_last = []
    for stage, policy in zip(reversed(split.stages), reversed(remat), strict=True):
        programs = _differentiate(split, stage, policy, returners)
        for at in programs.gradient_receives:
            returners.setdefault(stage.receives[at], []).append(stage.index)
        from_last.append(programs)
    return tuple(reversed(from_last))


def differentiate_alone(split: StageSplit, stage: Stage, remat: Remat = "none") -> StagePrograms:
    """Derives the passes of one stage without looking at the others.

    Every value that the stage sends and that may carry a gradient is taken to get a cotangent
    back, from the stage that follows.

    Args:
        split: the stages.
        stage: one of them.
        remat: the values that its backward pass computes again.
    """
    returners = {var: (stage.index + 1,) for var in stage.sends if var in split.active_values}
    return _differentiate(split, stage, remat, returners)


def _differentiate(
    split: StageSplit, stage: Stage, remat: Remat, returners: Mapping[Var, Sequence[int]]
) -> StagePrograms:
    """Derives the passes of one stage; `returners` says which later stages send cotangents.

    The middle stage of three, y = tanh(x w), received x: f32[2,4], parameter w: f32[4,4]:

    1. A value that it sends gets a cotangent if a later stage returns one: ȳ: f32[2,4]. A value
       that it receives may send a cotangent back if it is active: x̄.
    2. The joint program of the stage and its vector-Jacobian product is traced:
           u = x w;  y = tanh u;  ū = ȳ (1 − y²);  x̄ = ū wᵀ;  w̄ = xᵀ ū
    3. A cotangent is sent back if it depends on an incoming one: x̄ does, as ū reads ȳ.
    4. The equations that depend on an incoming cotangent are the backward pass: ū, x̄, w̄. The
       others are the forward pass: u, y. The backward pass reads x, y and w of it: x and y are
       stored, w is an input that the caller puts back in.
    """
    gradient_sends = tuple(at for at, var in enumerate(stage.sends) if var in returners)
    candidates = tuple(at for at, var in enumerate(stage.receives) if var in split.active_values)
    joint = _trace_joint(split, stage, gradient_sends, candidates)
    behind = dataflow.reachable(joint.equations, joint.incoming)
    returned = [
        at
        for at, atom in enumerate(joint.outputs["receives"])
        if isinstance(atom, Var) and atom in behind
    ]
    ahead = {name: joint.outputs[name] for name in ("sends", "state", "results")}
    back = {
        "params": joint.outputs["params"],
        "receives": tuple(joint.outputs["receives"][at] for at in returned),
    }
    forward, backward = _partition(joint, behind, ahead, back, remat)
    return StagePrograms(
        stage=stage,
        inputs=joint.inputs,
        cotangents=joint.cotangents,
        seed=joint.seed,
        forward=forward,
        backward=backward,
        fused=sliced(joint.equations, {**ahead, **back}, effects=True),
        gradient_sends=gradient_sends,
        gradient_receives=tuple(candidates[at] for at in returned),
        returners=tuple(tuple(sorted(returners[stage.sends[at]])) for at in gradient_sends),
    )


def stage_inputs(split: StageSplit, stage: Stage) -> dict[str, tuple[Var, ...]]:
    """The variables that a stage reads, by group, as they stand in its equations."""
    traced = split.traced
    return {
        "params": tuple(traced.params[i] for i in stage.params),
        "consts": tuple(traced.program.constvars[i] for i in stage.consts),
        "state": tuple(traced.state[i] for i in stage.state),
        "batch": tuple(traced.batch[i] for i in stage.batch),
        "key": (traced.key,) if stage.uses_key else (),
        "receives": stage.receives,
    }


def stage_outputs(split: StageSplit, stage: Stage) -> dict[str, tuple[Atom, ...]]:
    """The values that a stage makes, by group, as they stand in its equations."""
    return {
        "sends": stage.sends,
        "state": tuple(split.traced.new_state[i] for i in stage.updates),
        "results": tuple(split.results[i] for i in stage.outputs),
    }


def forward_only(split: StageSplit, stage: Stage) -> tuple[dict[str, tuple[Var, ...]], Program]:
    """The inputs and the forward pass of a stage that changes nothing: no gradient, no state."""
    outputs = stage_outputs(split, stage) | {"state": ()}
    return stage_inputs(split, stage), sliced(stage.equations, outputs, effects=True)


# ---------------------------------------------------------------- the joint trace


@dataclass(frozen=True, eq=False)
class _Joint:
    """A stage and its vector-Jacobian product as one program.

    Attributes:
        equations: those of both.
        inputs: the inputs of the stage, by group.
        seed: the cotangent of the loss, if the stage makes it.
        cotangents: the cotangents of the values that it sends.
        outputs: the outputs of the stage, by group, and the cotangents of its ``params`` and
            of its ``receives``.
    """

    equations: tuple[Equation, ...]
    inputs: dict[str, tuple[Var, ...]]
    seed: Var | None
    cotangents: tuple[Var, ...]
    outputs: dict[str, tuple[Atom, ...]]

    @property
    def incoming(self) -> tuple[Var, ...]:
        """All cotangents that come in, the seed last."""
        return self.cotangents if self.seed is None else (*self.cotangents, self.seed)


def _trace_joint(
    split: StageSplit,
    stage: Stage,
    gradient_sends: tuple[int, ...],
    gradient_receives: tuple[int, ...],
) -> _Joint:
    """Traces a stage and its vector-Jacobian product as one program."""
    groups = stage_inputs(split, stage)
    plain = Program(stage.equations, stage_outputs(split, stage))
    known = [var for name in _GROUPS for var in groups[name]]
    by = [*groups["params"], *(stage.receives[at] for at in gradient_receives)]
    makes_loss = 0 in stage.outputs
    losses = [split.traced.loss] if makes_loss else []
    of = [*losses, *(stage.sends[at] for at in gradient_sends)]

    def primal(point: list[Any], values: dict[Var, Any]) -> tuple[list[Any], Any]:
        outputs = plain.run({**values, **dict(zip(by, point, strict=True))})
        losses = [outputs["results"][0]] if makes_loss else []
        return losses + [outputs["sends"][at] for at in gradient_sends], outputs

    def joint(inputs: list[Any], cotangents: list[Any]) -> list[Any]:
        values = dict(zip(known, inputs, strict=True))
        point = [values[var] for var in by]
        _, pull_back, outputs = jax.vjp(lambda p: primal(p, values), point, has_aux=True)
        (gradients,) = pull_back(cotangents)
        num_params = len(groups["params"])
        outputs |= {"params": gradients[:num_params], "receives": gradients[num_params:]}
        return [outputs[name] for name in sizes]

    sizes = {name: len(group) for name, group in plain.outputs.items()}
    sizes |= {"params": len(groups["params"]), "receives": len(gradient_receives)}
    shapes = [[jaxprs.shape_of(var) for var in group] for group in (known, of)]
    program, _ = inline.trace(joint, *shapes)
    # Closed-over arrays are inputs; those left are of nested functions that were opened only now.
    program = inline.consts_to_literals(program)
    return _named(program, {name: len(groups[name]) for name in _GROUPS}, makes_loss, sizes)


def _named(
    program: InlinedProgram, num_inputs: dict[str, int], has_seed: bool, num_outputs: dict[str, int]
) -> _Joint:
    """A joint program with its variables by group; takes the size of each group, in order."""
    invars, outvars = iter(program.invars), iter(program.outvars)
    return _Joint(
        equations=program.equations,
        inputs={name: tuple(islice(invars, count)) for name, count in num_inputs.items()},
        seed=next(invars) if has_seed else None,
        cotangents=tuple(invars),
        outputs={name: tuple(islice(outvars, count)) for name, count in num_outputs.items()},
    )


# ---------------------------------------------------------------- the partition


def _partition(
    joint: _Joint,
    behind: set[Var],
    ahead: dict[str, tuple[Atom, ...]],
    back: dict[str, tuple[Atom, ...]],
    remat: Remat,
) -> tuple[Program, Program]:
    """Divides the joint program into a forward and a backward pass.

    Args:
        joint: the joint program.
        behind: the values that depend on an incoming cotangent, and these cotangents.
        ahead: the outputs of the forward pass.
        back: the outputs of the backward pass.
        remat: the values that the backward pass computes again.
    """
    inputs = joint.inputs
    gradients = [atom for group in back.values() for atom in group]
    # 1. The equations that depend on a cotangent are the backward pass. The values that it reads
    #    besides are its residuals.
    needed = sliced(joint.equations, back, effects=True).equations
    second = [equation for equation in needed if dataflow.reads_any(equation, behind)]
    reads = dataflow.free_variables(second, gradients)
    residuals = [var for var in reads if var not in joint.incoming]
    # 2. The other equations are the forward pass. The results of its loops that depend on weights
    #    alone get equations of their own, which can be computed again without the loop.
    first = [e for e in joint.equations if not dataflow.reads_any(e, behind)]
    unknown = ("state", "batch", "key", "receives")
    first = partial_eval(first, [var for name in unknown for var in inputs[name]])
    # 3. Of the values from which the residuals can be computed again, the smallest set is stored.
    at_hand = [var for name in _GROUPS if name != "receives" for var in inputs[name]]
    repeatable = _repeatable(first, inputs, remat)
    saved = smallest_stash(first, at_hand, inputs["receives"], residuals, repeatable)
    # 4. The backward pass begins with computing the residuals again.
    again = dataflow.needed(first, residuals, [*at_hand, *saved])
    backward = Program((*(first[i] for i in again), *second), back)
    return sliced(first, {**ahead, "saved": saved}, effects=True), backward


def _repeatable(
    equations: Sequence[Equation], inputs: dict[str, tuple[Var, ...]], remat: Remat
) -> Repeatable:
    """Which equations the backward pass may run again.

    1. None with a side effect.
    2. All that read parameters and constants alone, so that no weight is ever stored.
    3. All that read the batch, the key and constants alone, unless they are heavy.
    4. Of the rest, those that `remat` allows.
    """
    flow = dataflow.DataFlow(equations)
    roots = [*inputs["state"], *inputs["receives"]]
    of_line = flow.reachable([*roots, *inputs["batch"], *inputs["key"]])
    of_model = flow.reachable([*roots, *inputs["params"]])

    def repeatable(equation: Equation) -> bool:
        reads = set(jaxprs.variables(equation.invars))
        if jaxprs.has_effects(equation):
            return False
        if reads.isdisjoint(of_line):
            return True
        if reads.isdisjoint(of_model) and not jaxprs.is_heavy(equation):
            return True
        return _allows(remat, equation)

    return repeatable


def _allows(remat: Remat, equation: Equation) -> bool:
    """Whether `remat` lets the backward pass repeat an equation of the forward pass."""
    if remat == "full":
        return True
    if callable(remat):
        avals = [atom.aval for atom in equation.invars]
        saveable = remat(equation.primitive, *avals, **equation.params)
        if not isinstance(saveable, bool):
            raise ValueError(
                f"the remat policy answered {saveable!r} for {equation.primitive.name}; expected "
                "True (save) or False (recompute). Policies that offload are not supported."
            )
        return not saveable
    return jaxprs.is_cheap(equation)
