"""What to say when nothing fits.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pdjax.plan.alternatives import Case
from pdjax.plan.cost_model import Costs, Part, PlacedStage
from pdjax.plan.search import fits, least_excess
from pdjax.profile.profile import Profile
from pdjax.topology.topology import Level, Topology
from pdjax.units import format_bytes


def explain_infeasibility(case: Case, replicate: bool, num_stages: int | None) -> str:
    """By how many bytes the plan that comes nearest does not fit, and what would make it fit."""
    costs = case.costs
    best = least_excess(costs, replicate=replicate, num_stages=num_stages)
    if best is None:
        return (
            f"no plan has {num_stages} stages on {costs.topology}, whatever the memory. Use "
            "another number of stages."
        )
    excess, stage = _worst(costs, best)
    remedies = list(_remedies(case, replicate, num_stages))
    return (
        f"no plan fits into the memory of {costs.topology}. The one that comes nearest "
        f"(of {len(costs.stages(best))} stages) lacks "
        f"{format_bytes(excess)}: {_breakdown(costs, stage)}. What would make it fit: "
        f"{'; or '.join([f'{format_bytes(excess)} more on each worker', *remedies])}."
    )


def _worst(costs: Costs, parts: tuple[Part, ...]) -> tuple[float, PlacedStage]:
    stages = costs.stages(parts)
    number = max(range(len(stages)), key=lambda i: _excess(costs, stages[i]))
    return _excess(costs, stages[number]), stages[number]


def _excess(costs: Costs, stage: PlacedStage) -> float:
    return costs.stage_bytes(stage) - costs.limit_bytes(stage.workers)


def _breakdown(costs: Costs, stage: PlacedStage) -> str:
    memory, names = costs.memory, costs.profile.names
    copies = float(memory.param_copies(stage.warm_up))
    versions = copies - 1 - memory.optimizer_bytes_per_param_byte
    params = costs.params_of(stage)
    total = costs.stage_bytes(stage)
    rest = total - copies * params
    return (
        f"the stage of layers {names[stage.first]!r} to {names[stage.stop - 1]!r} needs "
        f"{format_bytes(total)} "
        f"({versions:.0f} × {format_bytes(params)} of weights, "
        f"{format_bytes((1 + memory.optimizer_bytes_per_param_byte) * params)} of gradients and "
        f"optimizer state, {format_bytes(rest)} of stash and buffers for "
        f"{int(memory.in_flight(stage.warm_up))} in flight"
        f"{', its forward pass recomputed' if stage.remat else ''}) and has "
        f"{format_bytes(costs.limit_bytes(stage.workers))}"
    )


def _remedies(case: Case, replicate: bool, num_stages: int | None) -> Iterator[str]:
    """Changes that were tried, and with which a plan fits."""
    costs = case.costs

    def helps(changed: Costs) -> bool:
        return fits(changed, replicate=replicate, num_stages=num_stages)

    if costs.memory.remat == "none" and helps(
        costs.changed(memory=replace(costs.memory, remat="auto"))
    ):
        yield "rematerialisation (let the planner choose it)"
    if costs.memory.stashes and helps(
        costs.changed(
            memory=replace(costs.memory, stashes=False, versions=None, num_microbatches=1)
        )
    ):
        yield "a synchronous schedule such as 'one_f_one_b', which keeps one version of the weights"
    for parts in (2, 4, 8):
        if helps(costs.changed(profile=_divided(case, parts))):
            yield f"microbatches of 1/{parts} of the size"
            break
    if num_stages is None and helps(costs.changed(topology=_twice(costs.topology))):
        yield "twice as many workers"


def _divided(case: Case, parts: int) -> Profile:
    """The profile for microbatches of a fraction of the size, as far as memory goes."""
    scaled = tuple(
        replace(layer, cut_bytes=layer.cut_bytes / parts, stash_bytes=layer.stash_bytes / parts)
        for layer in case.costs.profile.layers
    )
    return replace(case.costs.profile, layers=scaled)


def _twice(topology: Topology) -> Topology:
    *inner, outer = topology.levels
    levels = (*inner, Level(2 * outer.num_units, outer.bandwidth_bytes_per_s))
    return Topology(levels, topology.memory_bytes * 2)
