"""The plan that a `Pipeline` runs: the one that was asked for, or the one that is found for it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

from pdjax.errors import PdjaxWarning
from pdjax.pipeline.arguments import for_each_stage
from pdjax.pipeline.batch import BatchSpec
from pdjax.pipeline.settings import Settings
from pdjax.plan import Plan, PlanOptions, balanced_plan, manual_plan, plan_pipeline
from pdjax.plan.balance import check_enough_layers
from pdjax.profile.cached import find_profile
from pdjax.profile.profile import Profile
from pdjax.schedules import ALGORITHMS, Schedule, find_algorithm
from pdjax.split.differentiate import Remat
from pdjax.split.state_placement import inseparable_by_state, inseparable_by_ties
from pdjax.topology.bandwidth import ALONE_BYTES_PER_S
from pdjax.topology.measure import local_topology
from pdjax.topology.topology import Topology
from pdjax.trace.layers import LayerGraph, model_fingerprint


def make_plan(
    settings: Settings, graph: LayerGraph, spec: BatchSpec, params: Any, microbatch: Any
) -> Plan:
    """The plan that was asked for, checked against the model's layers."""
    names = graph.names
    work = [layer.flops for layer in graph.layers]
    if isinstance(settings.plan, tuple):
        return manual_plan(names, work, settings.plan)
    if isinstance(settings.plan, Plan):
        check_plan(settings.plan, graph)
        _warn_of_schedule(settings.plan, _planned_as(settings))
        return settings.plan
    if settings.plan == "balanced":
        together = inseparable_by_state(graph)
        if not settings.flushes:
            together += inseparable_by_ties(graph)
        cut_bytes = [layer.cut_bytes for layer in graph.layers]
        stages = settings.num_stages or len(settings.placements)
        return balanced_plan(names, work, cut_bytes, stages, together)
    count = settings.num_microbatches or 1
    if settings.chunks > 1:
        return _equal_chunks(settings, graph, spec.size // count, microbatch)
    options = PlanOptions(
        schedule=_planned_as(settings),
        num_microbatches=count,
        num_stages=settings.num_stages,
        straight=not (settings.replicate and _replicates(settings)),
        remat=_planned_remat(settings.remat),
        optimizer_bytes_per_param_byte=optimizer_ratio(settings.optimizer, params),
    )
    devices = tuple(next(iter(p.device_set)) for p in settings.placements)
    machines = Machines(devices, settings.topology, settings.profile)
    return automatic_plan(graph, machines, options, spec.size // count, microbatch)


def _equal_chunks(settings: Settings, graph: LayerGraph, batch_size: int, microbatch: Any) -> Plan:
    """Stages that take equally long by what is measured: the planner knows one stage a worker."""
    device = next(iter(settings.placements[0].device_set))
    profile = find_profile(settings.profile, graph, device, batch_size, microbatch)
    assert settings.num_stages is not None, "known where workers run several stages"
    return balanced_plan(
        graph.names,
        [layer.forward_s + layer.backward_s for layer in profile.layers],
        [layer.cut_bytes for layer in graph.layers],
        settings.num_stages,
        inseparable_by_state(graph),
    )


def _replicates(settings: Settings) -> bool:
    """Whether stages may be replicated under a schedule that is known by its name."""
    return isinstance(settings.schedule, str) and find_algorithm(settings.schedule).replicates


def check_plan(plan: Plan, graph: LayerGraph) -> None:
    """Raises ValueError if a plan was made for another model."""
    if plan.layers != graph.names:
        differing = sorted(set(plan.layers) ^ set(graph.names))
        raise ValueError(
            f"the plan was made for another model: {len(plan.layers)} layers in the "
            f"plan, {len(graph.names)} in this model; differing: {differing[:6]}. Make a new plan."
        )
    if plan.model and plan.model != model_fingerprint(graph):
        raise ValueError(
            f"the plan was made for another model: its fingerprint is {plan.model}, that of this "
            f"model {model_fingerprint(graph)}. The layers have the same names, but other "
            "parameters or sizes. Make a new plan."
        )


def _warn_of_schedule(plan: Plan, schedule: str) -> None:
    if plan.prediction is not None and plan.prediction.schedule != schedule:
        warnings.warn(
            f"the plan was made for the schedule {plan.prediction.schedule!r}, and {schedule!r} is "
            "to run: what it predicts, the memory above all, does not hold.",
            PdjaxWarning,
            stacklevel=4,
        )


def remat_of(settings: Settings, plan: Plan) -> tuple[Remat, ...]:
    """What each stage recomputes: as was asked for, else as was planned."""
    if settings.remat is None:
        return plan.remat
    return for_each_stage(settings.remat, plan.num_stages)


def _planned_remat(remat: Remat | Sequence[Remat] | None) -> Literal["auto", "none", "full"]:
    """What the planner reckons with. A policy saves less than all: it is planned as none."""
    if remat is None:
        return "auto"
    wishes = [remat] if isinstance(remat, str) or callable(remat) else list(remat)
    return "full" if all(wish == "full" for wish in wishes) else "none"


def _planned_as(settings: Settings) -> str:
    """The algorithm whose memory and order a plan reckons with."""
    schedule = settings.schedule
    name = schedule.name if isinstance(schedule, Schedule) else schedule
    return name if name in ALGORITHMS else "one_f_one_b" if settings.flushes else "pipedream"


def optimizer_ratio(optimizer: optax.GradientTransformation, params: Any) -> float:
    """Bytes of the optimizer state for each byte of the parameters."""
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    state = jax.eval_shape(optimizer.init, params)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return size / held if held else 0.0


@dataclass(frozen=True)
class Machines:
    """What an automatic plan is made for.

    Attributes:
        devices: the workers, in order.
        topology: how they are joined; measured if None.
        profile: the layers' figures; measured on the first device if None.
    """

    devices: tuple[Any, ...]
    topology: Topology | None = None
    profile: Profile | None = None


def automatic_plan(
    graph: LayerGraph, machines: Machines, options: PlanOptions, batch_size: int, batch: Any
) -> Plan:
    """The fastest plan for a model on the devices at hand.

    Args:
        graph: the model, traced for one microbatch.
        machines: what the plan is for.
        options: what the plan is to be like.
        batch_size: examples in a microbatch.
        batch: a microbatch, for the measurement; None to make one up.

    Raises:
        ValueError: if no plan is possible, or profile or topology do not go with model or devices.
    """
    check_enough_layers(graph.names, options.num_stages or 1)
    topology, devices = machines.topology, machines.devices
    if topology is not None and topology.num_workers > len(devices):
        raise ValueError(
            f"the topology {topology} has {topology.num_workers} workers, but there are "
            f"{len(devices)} devices: {list(devices)}. Give a topology of these, or plan for "
            "other machines with 'python -m pdjax.plan'."
        )
    alone = (options.num_stages == 1 and options.straight) or len(devices) == 1
    if alone and topology is None:  # no link matters, but memory may
        topology = local_topology(devices, bandwidth_bytes_per_s=ALONE_BYTES_PER_S)
    if alone and topology is not None and not topology.memory_bytes:
        return Plan(graph.names, (0,), (1.0,), model_fingerprint(graph))
    profile = find_profile(machines.profile, graph, devices[0], batch_size, batch)
    return plan_pipeline(profile, topology or local_topology(devices), options)
