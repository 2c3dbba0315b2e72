"""What the stages of a plan cost, from the profile of their layers or from the plan alone.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pdjax.plan.cost_model import BUFFERS
from pdjax.plan.plan import Plan
from pdjax.profile.profile import Profile
from pdjax.simulate.stage_cost import StageCost


def stage_costs(
    plan: Plan, profile: Profile | None = None, *, optimizer_bytes_per_param_byte: float = 2.0
) -> tuple[StageCost, ...]:
    """What the stages of a plan cost.

    A stage takes the sums of its layers. It sends what crosses the cut behind it, and as much
    returns. A stage that recomputes keeps its input only, and has its whole stash while it goes
    back. The weight part of a backward pass is half of it, and needs all of the stash; updates
    are not profiled and take no time.

    Args:
        plan: which layers make up which stage, and which stages recompute.
        profile: the layers. Without it, what the plan predicts for its stages, which does not say
            how much a stage that recomputes holds while it goes back.
        optimizer_bytes_per_param_byte: size of the optimizer state: 2 for Adam, 0 for plain SGD.

    Raises:
        ValueError: if the profile is that of another model, or the plan predicts nothing.
    """
    if profile is not None:
        if plan.layers != profile.names:
            raise ValueError(
                f"the plan has {len(plan.layers)} layers, the profile {len(profile.names)}, and "
                "they are not the same. Use the profile that the plan was made from."
            )
        recomputes = [remat == "full" for remat in plan.remat]
        return profiled_costs(
            profile, plan.first_layers, recomputes, optimizer_bytes_per_param_byte
        )
    if not plan.stages:
        raise ValueError(
            "the plan does not predict what its stages take, and there is no profile. Use the "
            "profile of its layers, or a plan that 'python -m pdjax.plan' wrote."
        )
    cuts = [0.0, *(stage.cut_bytes for stage in plan.stages)]
    found = []
    for number, figures in enumerate(plan.stages):
        recomputes = figures.remat == "full"
        forward_s = figures.forward_s * (2 if recomputes else 1)
        found.append(
            make_cost(
                stage=number,
                forward_s=figures.forward_s,
                backward_s=max(0.0, figures.compute_s - forward_s),
                param_bytes=figures.param_bytes,
                stash_bytes=figures.stash_bytes,
                cuts=(cuts[number], cuts[number + 1]),
                optimizer_bytes=optimizer_bytes_per_param_byte * figures.param_bytes,
                recomputes=recomputes,
            )
        )
    return tuple(found)


def profiled_costs(
    profile: Profile,
    first_layers: Sequence[int],
    recomputes: Sequence[bool],
    optimizer_bytes_per_param_byte: float,
) -> tuple[StageCost, ...]:
    """What stages of a model cost.

    Args:
        profile: the layers.
        first_layers: for each stage its first layer.
        recomputes: for each stage whether its backward pass repeats the forward pass.
        optimizer_bytes_per_param_byte: size of the optimizer state.
    """
    cuts = [0.0, *(profile.layers[at - 1].cut_bytes for at in first_layers[1:]), 0.0]
    found = []
    for stage, (first, stop) in enumerate(pairwise([*first_layers, len(profile.layers)])):
        layers = profile.layers[first:stop]
        params = sum(layer.param_bytes for layer in layers)
        found.append(
            make_cost(
                stage=stage,
                forward_s=sum(layer.forward_s for layer in layers),
                backward_s=sum(layer.backward_s for layer in layers),
                param_bytes=params,
                stash_bytes=sum(layer.stash_bytes for layer in layers),
                cuts=(cuts[stage], cuts[stage + 1]),
                optimizer_bytes=optimizer_bytes_per_param_byte * params,
                recomputes=recomputes[stage],
            )
        )
    return tuple(found)


def make_cost(
    *,
    stage: int,
    forward_s: float,
    backward_s: float,
    param_bytes: float,
    stash_bytes: float,
    cuts: tuple[float, float],
    optimizer_bytes: float,
    recomputes: bool = False,
) -> StageCost:
    """The cost of a stage in a chain.

    Args:
        stage: its number.
        forward_s: seconds of its forward pass.
        backward_s: seconds of its backward pass, without what it recomputes.
        param_bytes: bytes of its weights.
        stash_bytes: bytes that wait for its backward pass if it does not recompute.
        cuts: bytes that cross the cuts before it and behind it.
        optimizer_bytes: bytes of its optimizer state.
        recomputes: whether its backward pass repeats its forward pass.
    """
    before, behind = cuts
    again_s = forward_s if recomputes else 0.0
    return StageCost(
        forward_s=forward_s,
        backward_s=again_s + backward_s,
        input_s=again_s + backward_s / 2,
        weight_s=backward_s / 2,
        param_bytes=param_bytes,
        optimizer_bytes=optimizer_bytes,
        gradient_bytes=param_bytes,
        stash_bytes=before if recomputes else stash_bytes,
        held_bytes=stash_bytes,
        pass_bytes=BUFFERS * (before + behind) + (stash_bytes if recomputes else 0.0),
        sends=((stage + 1, behind),) if behind else (),
        returns=((stage - 1, before),) if before else (),
    )
