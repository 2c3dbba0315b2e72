"""What the compiled stages of a pipeline cost, for the simulator.

Bytes are those that the executor counts; seconds come from a profile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pdjax.plan import Plan
from pdjax.profile.profile import Profile
from pdjax.runtime.programs import Passes
from pdjax.runtime.stage import StageRunner
from pdjax.runtime.update import UpdateRunner
from pdjax.simulate import StageCost
from pdjax.simulate.costing import profiled_costs
from pdjax.split.differentiate import Remat
from pdjax.trace import jaxprs
from pdjax.trace.flops import equation_flops
from pdjax.trace.program import Program


def compiled_costs(
    passes: Passes,
    updates: Sequence[UpdateRunner],
    plan: Plan,
    remat: Sequence[Remat],
    profile: Profile,
) -> tuple[StageCost, ...]:
    """For each stage its seconds and bytes.

    A divided backward pass takes as long as the whole, shared out by the work in its parts. What a
    policy of `jax.checkpoint` recomputes is not known, and takes no time.

    Args:
        passes: the programs of minibatches of some shape.
        updates: the update of each place.
        plan: which layers make up which stage.
        remat: what the backward pass of each stage recomputes.
        profile: the figures of these layers, for one microbatch.

    Raises:
        ValueError: if the profile has other layers than the plan.
    """
    if profile.names != plan.layers:
        raise ValueError(
            f"the profile has {len(profile.layers)} layers, the plan {len(plan.layers)}, or they "
            "differ in their names; expected that of this model: pipe.profile(params, batch)."
        )
    recomputes = [wish == "full" for wish in remat]
    profiled = profiled_costs(profile, plan.first_layers, recomputes, 0.0)
    return tuple(_as_compiled(cost, stage, passes, updates) for stage, cost in enumerate(profiled))


def _as_compiled(
    cost: StageCost, stage: int, passes: Passes, updates: Sequence[UpdateRunner]
) -> StageCost:
    """A stage's cost with the bytes that the executor counts."""
    replica = passes.replicas.of_stage(stage)[0]
    runner, kinds, routes = passes.stages[replica], passes.kinds[replica], passes.routes[stage]
    share = _input_share(runner) if "I" in kinds else 0.5
    param_bytes = sum(map(jaxprs.num_bytes, runner.programs.inputs["params"]))
    return replace(
        cost,
        input_s=cost.backward_s * share,
        weight_s=cost.backward_s * (1 - share),
        param_bytes=param_bytes,
        optimizer_bytes=sum(map(_bytes, updates[replica].state_shapes)),
        gradient_bytes=0 if "FBU" in kinds else param_bytes,
        stash_bytes=passes.stash_bytes[replica] if "F" in kinds else 0,
        held_bytes=passes.held_bytes[replica],
        pass_bytes=0,  # what a program needs while it runs is not counted
        sends=routes.forward_bytes,
        returns=routes.backward_bytes,
    )


def _input_share(runner: StageRunner) -> float:
    """The share of the input part in the work of a backward pass."""
    parts = runner.divided.backward
    first, second = _flops(parts.input_part), _flops(parts.weight_part)
    return first / (first + second) if first + second else 0.5


def _flops(program: Program) -> float:
    return sum(map(equation_flops, program.equations))


def _bytes(shape: Any) -> int:
    return math.prod(shape.shape) * shape.dtype.itemsize
