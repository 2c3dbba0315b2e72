"""The forward and the backward pass of a stage, as two programs.

A stage is traced once together with its vector-Jacobian product. The equations that depend on an
incoming cotangent are the backward pass; what they read of the rest are *residuals*, which wait in
the stash of every microbatch in flight. Taken as `jax.vjp` hands them out, residuals hold copies of
the weights: `jax.jit` returns an input that is also an output as a new array, and a cast or
transposed weight is a new array anyway. Here a residual is

    an input of the stage      put back in by the caller, from the stashed version of the weights
    made of parameters,        computed again by the backward pass, never stored
    constants, batch or key
    anything else              stored, or made again by a few element-wise operations out of less
                               (`pdjax.split.min_cut` finds the smallest set to store)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from pdjax.split.min_cut import Repeatable, smallest_stash
from pdjax.split.partial_eval import partial_eval
from pdjax.split.stages import Stage, StageSplit
from pdjax.trace import inline, jaxprs
from pdjax.trace.inline import InlinedProgram
from pdjax.trace.jaxprs import Atom, Equation, Var
from pdjax.trace.program import Program

Remat = Literal["none", "full"] | Callable[..., Any]
"""What a backward pass computes again: ``"none"`` (nothing that costs), ``"full"`` (all of the
forward pass), or what a `jax.checkpoint` policy does not let it save."""


@dataclass(frozen=True, eq=False)
class StagePrograms:
    """What a stage computes for one microbatch.

    Attributes:
        stage: the stage.
        inputs: the variables of its inputs, by group: ``params, consts, state, batch, key,
            receives``, in the order of `Stage`.
        cotangents: a variable for the cotangent of each of `gradient_sends`.
        seed: the variable for the cotangent of the loss, if this stage makes it.
        forward: makes ``sends, state, results`` and ``saved``, what the stash must hold.
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
    receives is zero whatever comes (the value was rounded, say), nothing is sent back, and the
    stages before it are derived without that cotangent, as `jax.grad` would: an array of zeros
    in its place would make NaN of what is infinite there.

    Args:
        split: the stages.
        remat: for each stage what its backward pass computes again.
    """
    returners: dict[Var, list[int]] = {}
    made = []
    for stage, how in zip(reversed(split.stages), reversed(remat), strict=True):
        programs = _differentiate(split, stage, how, returners)
        for at in programs.gradient_receives:
            returners.setdefault(stage.receives[at], []).append(stage.index)
        made.append(programs)
    return tuple(reversed(made))


def differentiate_alone(split: StageSplit, stage: Stage, remat: Remat = "none") -> StagePrograms:
    """Derives the passes of one stage without looking at the others.

    Every value that the stage sends and that may carry a gradient is taken to get a cotangent
    back, from the stage that follows.

    Args:
        split: the stages.
        stage: one of them.
        remat: what its backward pass computes again.
    """
    returners = {var: (stage.index + 1,) for var in stage.sends if var in split.active_values}
    return _differentiate(split, stage, remat, returners)


def _differentiate(
    split: StageSplit, stage: Stage, remat: Remat, returners: Mapping[Var, Sequence[int]]
) -> StagePrograms:
    """Derives the passes of one stage; `returners` says which later stages send cotangents."""
    gradient_sends = tuple(at for at, var in enumerate(stage.sends) if var in returners)
    candidates = tuple(at for at, var in enumerate(stage.receives) if var in split.active_values)
    groups = stage_inputs(split, stage)
    makes_loss = 0 in stage.outputs
    joint, sizes = _trace_joint(split, stage, groups, gradient_sends, candidates)
    invars = iter(joint.invars)
    inputs = {name: tuple(next(invars) for _ in groups[name]) for name in _GROUPS}
    seed = next(invars) if makes_loss else None
    cotangents = tuple(invars)
    outvars = iter(joint.outvars)
    outputs = {name: tuple(next(outvars) for _ in range(size)) for name, size in sizes.items()}
    tangent_inputs = cotangents if seed is None else (*cotangents, seed)
    behind = _depending(joint.equations, tangent_inputs)
    varying = [
        at
        for at, atom in enumerate(outputs["receives"])
        if isinstance(atom, Var) and atom in behind
    ]
    ahead = {name: outputs[name] for name in ("sends", "state", "results")}
    back = {
        "params": outputs["params"],
        "receives": tuple(outputs["receives"][at] for at in varying),
    }
    first, second = _partition(joint, inputs, tangent_inputs, ahead, back, remat)
    return StagePrograms(
        stage=stage,
        inputs=inputs,
        cotangents=cotangents,
        seed=seed,
        forward=first,
        backward=second,
        fused=_program(joint.equations, {**ahead, **back}),
        gradient_sends=gradient_sends,
        gradient_receives=tuple(candidates[at] for at in varying),
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
    return stage_inputs(split, stage), _program(stage.equations, outputs)


# ---------------------------------------------------------------- the joint trace


def _trace_joint(
    split: StageSplit,
    stage: Stage,
    groups: dict[str, tuple[Var, ...]],
    gradient_sends: tuple[int, ...],
    gradient_receives: tuple[int, ...],
) -> tuple[InlinedProgram, dict[str, int]]:
    """Traces the stage and its vector-Jacobian product as one program.

    Returns it with the number of its outputs in each group, in order.
    """
    plain = Program(stage.equations, stage_outputs(split, stage))
    differentiable = [*groups["params"], *(stage.receives[at] for at in gradient_receives)]
    given = [var for name in _GROUPS for var in groups[name]]
    makes_loss = 0 in stage.outputs

    def primal(point: list[Any], rest: dict[Var, Any]) -> tuple[list[Any], Any]:
        made = plain.run({**rest, **dict(zip(differentiable, point, strict=True))})
        losses = [made["results"][0]] if makes_loss else []
        return losses + [made["sends"][at] for at in gradient_sends], made

    def joint(values: list[Any], cotangents: list[Any]) -> list[Any]:
        known = dict(zip(given, values, strict=True))
        point = [known[var] for var in differentiable]
        _, pull_back, made = jax.vjp(lambda p: primal(p, known), point, has_aux=True)
        (gradients,) = pull_back(cotangents)
        num_params = len(groups["params"])
        made |= {"params": gradients[:num_params], "receives": gradients[num_params:]}
        return [made[name] for name in sizes]

    sizes = {name: len(group) for name, group in plain.outputs.items()}
    sizes |= {"params": len(groups["params"]), "receives": len(gradient_receives)}
    losses = [split.traced.loss] if makes_loss else []
    sends = [stage.sends[at] for at in gradient_sends]
    shapes = [[jaxprs.shape_of(var) for var in group] for group in (given, [*losses, *sends])]
    program, _ = inline.trace(joint, *shapes)
    # Closed-over arrays are inputs; those left are of nested functions that were opened only now.
    return inline.consts_to_literals(program), sizes


# ---------------------------------------------------------------- the partition


def _partition(
    joint: InlinedProgram,
    inputs: dict[str, tuple[Var, ...]],
    cotangents: tuple[Var, ...],
    ahead: dict[str, tuple[Atom, ...]],
    back: dict[str, tuple[Atom, ...]],
    remat: Remat,
) -> tuple[Program, Program]:
    """Divides the joint program into a forward and a backward pass."""
    gradients = [atom for group in back.values() for atom in group]
    behind = _depending(joint.equations, cotangents)
    second = [e for e in _program(joint.equations, back).equations if _reads(e, behind)]
    needs = jaxprs.free_variables(second, gradients)
    residuals = [var for var in needs if var not in cotangents]
    first = [equation for equation in joint.equations if not _reads(equation, behind)]
    first = partial_eval(
        first, [*inputs["state"], *inputs["batch"], *inputs["key"], *inputs["receives"]]
    )
    at_hand = [var for name in _GROUPS if name != "receives" for var in inputs[name]]
    repeatable = _repeatable(first, inputs, remat)
    saved = smallest_stash(first, at_hand, inputs["receives"], residuals, repeatable)
    again = jaxprs.needed(first, residuals, [*at_hand, *saved])
    backward = Program((*(first[i] for i in again), *second), back)
    return _program(first, {**ahead, "saved": saved}), backward


def _program(equations: Sequence[Equation], outputs: dict[str, tuple[Atom, ...]]) -> Program:
    """The equations that `outputs` need, and those that are there for their side effect."""
    observers = [e for e in equations if jaxprs.has_effects(e)]
    wanted = [atom for group in outputs.values() for atom in group]
    wanted += [atom for equation in observers for atom in equation.invars]
    kept = set(jaxprs.needed(equations, wanted))
    kept |= {i for i, equation in enumerate(equations) if jaxprs.has_effects(equation)}
    return Program(tuple(equations[i] for i in sorted(kept)), outputs)


def _reads(equation: Equation, values: set[Var]) -> bool:
    return not values.isdisjoint(jaxprs.variables(equation.invars))


def _depending(equations: Sequence[Equation], roots: Sequence[Var]) -> set[Var]:
    """`roots` and all values that depend on them."""
    reached = set(roots)
    for equation in equations:
        if _reads(equation, reached):
            reached.update(equation.outvars)
    return reached


def _repeatable(
    equations: Sequence[Equation], inputs: dict[str, tuple[Var, ...]], remat: Remat
) -> Repeatable:
    """Which equations the backward pass may run again.

    What is made of parameters and constants alone always, so that no weight is ever stored; what
    is made of the batch and the key too, unless it is heavy; the rest as `remat` says. Nothing
    with a side effect.
    """
    roots = [*inputs["state"], *inputs["receives"]]
    of_line = _depending(equations, [*roots, *inputs["batch"], *inputs["key"]])
    of_params = _depending(equations, inputs["params"])
    of_inputs = _depending(equations, roots)

    def repeatable(equation: Equation) -> bool:
        reads = set(jaxprs.variables(equation.invars))
        if jaxprs.has_effects(equation):
            return False
        if not reads & of_line:
            return True
        if not reads & (of_params | of_inputs) and not jaxprs.is_heavy(equation):
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
