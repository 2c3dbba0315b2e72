"""What a pipeline will run, resolved before anything is compiled: plan, schedule, weight rule.

Where the devices belong to several processes, the first one decides, and the others are told; what
all of them were given is compared before that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pdjax.distributed import Peers
from pdjax.pipeline.arguments import AUTO
from pdjax.pipeline.batch import BatchSpec
from pdjax.pipeline.choose_plan import make_plan, remat_of
from pdjax.pipeline.choose_schedule import choose_schedule
from pdjax.pipeline.consistency import check_agreement, facts
from pdjax.pipeline.settings import Settings, make_schedule, place_stages
from pdjax.plan import Plan
from pdjax.schedules import Schedule
from pdjax.schedules.weight_rule import WeightRule
from pdjax.simulate import Comparison
from pdjax.split.differentiate import Remat
from pdjax.topology.measure import joint_topology
from pdjax.topology.topology import Topology
from pdjax.trace.layers import LayerGraph, build_graph
from pdjax.trace.random_key import taking_key


@dataclass(frozen=True)
class Example:
    """What a pipeline is made for.

    Attributes:
        params: shapes of the parameters.
        state: shapes of the mutable state.
        key: the base random key.
        spec: what a minibatch looks like.
        batch: a minibatch, or its shapes.
    """

    params: Any
    state: Any
    key: Any
    spec: BatchSpec
    batch: Any

    def trace(self, settings: Settings, loss_fn: Callable[..., Any], batch: Any) -> LayerGraph:
        """A loss function, traced for a batch of shapes."""
        return build_graph(
            taking_key(loss_fn, self.state is not None),
            self.params,
            batch,
            self.key,
            model_state=self.state,
            weighted_loss=settings.weighted_loss,
        )

    def trace_microbatch(self, settings: Settings) -> LayerGraph:
        """The loss function, traced for a microbatch."""
        count = settings.num_microbatches or 1
        return self.trace(settings, settings.loss_fn, self.spec.microbatch(count))

    def first_microbatch(self, settings: Settings) -> Any:
        """A microbatch, to measure with; None if there are only shapes."""
        return self.spec.first_microbatch(self.batch, settings.num_microbatches or 1)


@dataclass(frozen=True)
class Resolved:
    """What is run.

    Attributes:
        settings: with all that was resolved; placements are those of the stages' replicas.
        graph: the loss function, traced for a microbatch.
        plan: which layers make up which stage.
        remat: what each stage recomputes.
        schedule: what a step does.
        rule: which weights a backward pass reads.
        comparison: the schedules that it was chosen from; None if it was given, or chosen by
            another process.
    """

    settings: Settings
    graph: LayerGraph
    plan: Plan
    remat: tuple[Remat, ...]
    schedule: Schedule
    rule: WeightRule
    comparison: Comparison | None


def resolve(
    settings: Settings, example: Example, params: Any, model_state: Any, peers: Peers | None
) -> Resolved:
    """Finds plan and schedule.

    Args:
        settings: what the user asked for, with the number of microbatches.
        example: what the pipeline is made for.
        params: the parameters, or what makes them, which processes compare.
        model_state: the mutable state likewise.
        peers: the processes, if there are several.

    Raises:
        ValueError: if no plan or schedule is possible, or the processes were given different
            things; in every process.
    """
    graph = example.trace_microbatch(settings)
    if peers is None:
        found = _choose(settings, example, graph)
    else:
        mine = facts(settings, graph, example.key, example.spec, params, model_state)
        check_agreement(peers, mine)
        found = _choose_together(settings, example, graph, peers)
    chosen, plan, comparison = found
    if chosen.num_microbatches != settings.num_microbatches:
        graph = example.trace_microbatch(chosen)
    chosen = chosen.for_plan(plan)
    schedule, rule = make_schedule(chosen)
    placements = tuple(place_stages(plan, schedule, chosen.placements))
    resolved = replace(chosen, placements=placements)
    return Resolved(resolved, graph, plan, remat_of(resolved, plan), schedule, rule, comparison)


_Choice = tuple[Settings, Plan, Comparison | None]


def _choose(settings: Settings, example: Example, graph: LayerGraph) -> _Choice:
    """The schedule, if it is to be found, and the plan."""
    chosen, comparison = settings, None
    microbatch = example.first_microbatch(settings)
    if settings.schedule == AUTO:
        chosen, comparison = choose_schedule(
            settings, graph, example.spec, example.params, microbatch
        )
        if chosen.num_microbatches != settings.num_microbatches:
            graph = example.trace_microbatch(chosen)
            microbatch = example.first_microbatch(chosen)
    return chosen, make_plan(chosen, graph, example.spec, example.params, microbatch), comparison


def _choose_together(
    settings: Settings, example: Example, graph: LayerGraph, peers: Peers
) -> _Choice:
    """What the first process chooses; all measure what joins them."""
    settings = replace(settings, topology=_find_topology(settings, peers))
    said: dict[str, Any] = {}
    comparison = None
    if peers.process_id == 0:
        try:
            chosen, plan, comparison = _choose(settings, example, graph)
            said = {"num_microbatches": chosen.num_microbatches, "plan": plan.to_json()}
            said |= {"slack": chosen.slack, "update_lag": chosen.update_lag}
            said["schedule"] = None if chosen.schedule == settings.schedule else chosen.schedule
        except ValueError as error:
            said = {"error": str(error)}
    said = peers.exchange("plan", said)[0]
    if "error" in said:
        raise ValueError(said["error"])
    chosen = replace(
        settings,
        num_microbatches=said["num_microbatches"],
        schedule=said["schedule"] or settings.schedule,
        slack=said["slack"],
        update_lag=said["update_lag"],
    )
    return chosen, Plan.from_json(said["plan"]), comparison


def _find_topology(settings: Settings, peers: Peers) -> Topology | None:
    """How the devices are joined, if it must be known."""
    is_planned = settings.plan == AUTO and settings.chunks == 1
    if settings.topology is not None or not (is_planned or settings.schedule == AUTO):
        return settings.topology
    devices = [next(iter(placement.device_set)) for placement in settings.placements]
    return joint_topology(devices, peers)
