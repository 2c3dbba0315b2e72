"""What the compiled stages of a pipeline cost, for the simulator.

Bytes are those that the executor counts; seconds come from a profile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pdjax import jaxprs
from pdjax.costs import equation_flops
from pdjax.planner import Plan
from pdjax.profile import Profile
from pdjax.program import Program
from pdjax.runtime.passes import Passes
from pdjax.runtime.stage import StageRunner
from pdjax.runtime.update import UpdateRunner
from pdjax.simulator import StageCost


def stage_costs(
    passes: Passes, updates: Sequence[UpdateRunner], plan: Plan, profile: Profile
) -> tuple[StageCost, ...]:
    """For each stage its seconds and bytes.

    A divided backward pass takes as long as the whole, shared out by the work in its parts.

    Args:
        passes: the programs of minibatches of some shape.
        updates: the update of each stage.
        plan: which layers make up which stage.
        profile: the figures of these layers, for one microbatch.

    Raises:
        ValueError: if the profile has other layers than the plan.
    """
    if profile.names != plan.layers:
        raise ValueError(
            f"the profile has {len(profile.layers)} layers, the plan {len(plan.layers)}, or they "
            "differ in their names; expected that of this model: pipe.profile(params, batch)."
        )
    bounds = [*plan.first_layers, len(plan.layers)]
    costs = []
    for stage in range(plan.num_stages):
        place = passes.places.of_stage(stage)[0]
        runner, kinds = passes.stages[place], passes.kinds[place]
        layers = profile.layers[bounds[stage] : bounds[stage + 1]]
        forward_s = sum(layer.forward_s for layer in layers)
        backward_s = sum(layer.backward_s for layer in layers)
        if plan.remat[stage] == "full":
            backward_s += forward_s
        share = _input_share(runner) if "I" in kinds else 0.5
        routes = passes.routes[stage]
        param_bytes = sum(map(jaxprs.num_bytes, runner.programs.inputs["params"]))
        costs.append(
            StageCost(
                forward_s=forward_s,
                backward_s=backward_s,
                input_s=backward_s * share,
                weight_s=backward_s * (1 - share),
                param_bytes=param_bytes,
                optimizer_bytes=sum(map(_bytes, updates[place].state_shapes)),
                gradient_bytes=0 if "FBU" in kinds else param_bytes,
                stash_bytes=passes.stash_bytes[place] if "F" in kinds else 0,
                held_bytes=passes.held_bytes[place],
                sends=tuple(sorted(routes.forward_bytes.items())),
                returns=tuple(sorted(routes.backward_bytes.items())),
            )
        )
    return tuple(costs)


def _input_share(runner: StageRunner) -> float:
    """The share of the input part in the work of a backward pass."""
    parts = runner.divided.backward
    first, second = _flops(parts.input_part), _flops(parts.weight_part)
    return first / (first + second) if first + second else 0.5


def _flops(program: Program) -> float:
    return sum(map(equation_flops, program.equations))


def _bytes(shape: Any) -> int:
    return math.prod(shape.shape) * shape.dtype.itemsize
