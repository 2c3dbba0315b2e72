"""``schedule="auto"``: the fastest schedule that fits into memory, by simulation."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from pdjax.pipeline.batch import BatchSpec
from pdjax.pipeline.choose_plan import make_plan, optimizer_ratio
from pdjax.pipeline.settings import Settings
from pdjax.plan import Plan
from pdjax.profile.cached import find_profile
from pdjax.schedules import ALGORITHMS, find_algorithm
from pdjax.simulate import Comparison, choose, compare
from pdjax.split.optimizer import split_update
from pdjax.split.stages import split
from pdjax.topology.measure import local_topology
from pdjax.trace.layers import LayerGraph

_log = logging.getLogger("pdjax")

_PLANNED_AS = "one_f_one_b"  # of those that every model allows the one that may have replicas


def choose_schedule(
    settings: Settings, graph: LayerGraph, spec: BatchSpec, params: Any, microbatch: Any
) -> tuple[Settings, Comparison]:
    """Simulates all schedules that may be run, on the plan for 1F1B, and takes the fastest.

    What a schedule does to the numbers is not weighed: asynchronous ones are considered only if
    the user allows stale weights, and then count by their time alone.

    Args:
        settings: with ``"auto"`` in the place of the schedule, and a number of microbatches.
        graph: the model, traced for one microbatch.
        spec: the minibatch.
        params: shapes of the parameters.
        microbatch: a microbatch, for the measurement; None to make one up.

    Returns:
        The settings with all that decides the plan under that schedule, and the comparison.

    Raises:
        ValueError: if no schedule fits; the text has the table.
    """
    assert settings.num_microbatches is not None, "the batch has said how many"
    count = settings.num_microbatches
    devices = tuple(next(iter(placement.device_set)) for placement in settings.placements)
    topology = settings.topology or local_topology(devices)
    profile = find_profile(settings.profile, graph, devices[0], spec.size // count, microbatch)
    figures = replace(settings, topology=topology, profile=profile)
    plan = make_plan(replace(figures, schedule=_PLANNED_AS), graph, spec, params, microbatch)
    names = [name for name in ALGORITHMS if _is_allowed(settings, plan, name)]
    if settings.allow_stale and not _may_be_stale(settings, plan, graph, params):
        names = [name for name in names if not find_algorithm(name).stale]
    comparison = compare(
        plan,
        profile,
        topology,
        num_microbatches=count,
        schedules=names,
        optimizer_bytes_per_param_byte=optimizer_ratio(settings.optimizer, params),
        choose_options=True,
    )
    if not comparison.outcomes:
        raise ValueError(
            f"schedule='auto' finds none that can run {plan.num_stages} stages with "
            f"{plan.replicas} replicas:\n\n{comparison}\n\nGive another plan or number of "
            "stages, or a topology with a worker for each replica."
        )
    chosen = choose(comparison.outcomes, settings.allow_stale)
    _log.info("schedules by simulation\n%s\nchosen: %s", comparison, chosen.name)
    candidate = comparison.candidates[comparison.outcomes.index(chosen)]
    if not find_algorithm(chosen.name).divides:
        figures = replace(figures, num_microbatches=1, profile=settings.profile)
    resolved = replace(
        figures,
        schedule=chosen.name,
        num_stages=candidate.schedule.num_stages,
        slack=candidate.slack,
        update_lag=candidate.update_lag,
    )
    return replace(resolved, plan=plan) if chosen.name == _PLANNED_AS else resolved, comparison


def _is_allowed(settings: Settings, plan: Plan, name: str) -> bool:
    """Whether the arguments, and the replicas of the plan for 1F1B, leave room for a schedule."""
    algorithm = find_algorithm(name)
    if algorithm.stale and not settings.allow_stale:
        return False
    if algorithm.stale and algorithm.divides and settings.state_update == "minibatch":
        return False  # the next minibatch begins before there is a mean of the one before
    if settings.num_stages is None and isinstance(settings.plan, str):
        return True
    return algorithm.num_chunks == 1 and (algorithm.replicates or max(plan.replicas) == 1)


def _may_be_stale(settings: Settings, plan: Plan, graph: LayerGraph, params: Any) -> bool:
    """Whether stages can update at different times: no tied weights, nothing that mixes them."""
    stages = split(graph, plan.first_layers)
    if any(len(homes) > 1 for homes in stages.homes):
        return False
    names = stages.traced.param_names
    update = split_update(settings.optimizer, params, stages.homes, names, plan.num_stages)
    return not update.mixes
