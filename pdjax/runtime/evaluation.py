"""Forward-only runs through the stages, for evaluation: a schedule without backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.sharding import Sharding

from pdjax.communication.transport import Renumbered, Transport
from pdjax.runtime.binder import Binder, StageBinding
from pdjax.runtime.executor import Executor
from pdjax.runtime.inputs import Given, Reads
from pdjax.runtime.listing import Listing
from pdjax.runtime.metrics import Results
from pdjax.runtime.microbatches import MicrobatchSlicer, Slicing
from pdjax.runtime.replica_map import ReplicaMap
from pdjax.runtime.routing import find_forward_routes
from pdjax.runtime.stage import OutputIndex
from pdjax.runtime.state import Feed, LastingState, Run, StageState, WorkerTally
from pdjax.schedules import forward_only
from pdjax.schedules.lower import StageInterface, lower_cycle
from pdjax.schedules.weight_rule import LATEST
from pdjax.split import differentiate
from pdjax.split.stages import Stage, StageSplit
from pdjax.trace.jit import Values, jit_on


class ForwardRunner:
    """The compiled forward pass of one stage that changes nothing.

    ``forward(weights, given, received)`` returns its outputs in the order of `forward_outputs`.
    """

    def __init__(self, split: StageSplit, stage: Stage, placement: Sharding) -> None:
        self._inputs, self._program = differentiate.forward_only(split, stage)
        self.forward_outputs = OutputIndex(self._program)
        read = set(self._program.reads)
        groups = {name: not read.isdisjoint(self._inputs[name]) for name in Reads._fields}
        self.forward_reads = Reads(**groups)
        self.forward = jit_on(self._forward, placement)

    def _forward(self, weights: Values, given: Given, received: Values) -> Values:
        groups = {"params": weights, "receives": received, **given._asdict()}
        values = {
            var: value
            for name, variables in self._inputs.items()
            for var, value in zip(variables, groups[name] or (None,) * len(variables), strict=True)
        }
        return self.forward_outputs.distinct(self._program.run(values))


class Evaluation:
    """The compiled forward passes of all stages for one shape of batch.

    It runs the schedule `pdjax.schedules.forward_only` in the loop that training steps run in.

    Args:
        split: the loss function, cut into stages.
        where: for each stage the replica that runs it.
        placements: where the replicas are.
        consts: for each replica the closed-over arrays that its stage reads.
        slicing: how a batch divides into microbatches.
        metric_axes: the axes along which metrics of microbatches are concatenated, or None.
        transport: how values travel between the replicas.

    Attributes:
        split: the loss function, cut into stages.
        metrics_tree: the structure of the metrics, or None if there are none.
        listing: what this process does with every batch.
        results: puts a batch's loss and metrics together.
    """

    def __init__(
        self,
        split: StageSplit,
        where: Sequence[int],
        placements: Sequence[Sharding],
        consts: Sequence[Values],
        slicing: Slicing,
        metric_axes: Sequence[int | None],
        transport: Transport,
    ) -> None:
        self.split, self._slicing, self._where = split, slicing, where
        self.metrics_tree = split.traced.metrics_tree
        schedule = forward_only(len(split.stages), slicing.num_microbatches)
        transport = Renumbered(transport, where)
        self._is_local = transport.is_local
        self._executor = Executor(schedule, LATEST, transport)
        chosen = [placements[replica] for replica in where]
        self._slicers = [MicrobatchSlicer(each, keeps_in_place=True) for each in chosen]
        self.results = Results(split, slicing.num_microbatches, metric_axes, chosen[-1])
        routes = find_forward_routes(split)
        interfaces = [StageInterface(each.forward_bytes) for each in routes]
        bindings = [
            StageBinding(
                ForwardRunner(split, stage, chosen[at]),
                routes[at],
                consts[where[at]],
                stage.state,
                (),
            )
            for at, stage in enumerate(split.stages)
        ]
        binder = Binder(
            lower_cycle(schedule, LATEST, interfaces),
            schedule.cycle,
            bindings,
            ReplicaMap.of(schedule),
            self._is_local,
            len(split.results),
        )
        self.listing: Listing = binder.listing()

    def run(
        self,
        weights: Sequence[Sequence[Any]],
        model: Sequence[Sequence[Any]],
        batch: Sequence[Any],
        keys: Sequence[Any],
    ) -> tuple[Any, Values]:
        """Dispatches the forward passes; returns the loss and the metrics' leaves.

        Args:
            weights: for each stage its parameter leaves; of one in another process None.
            model: for each stage the leaves of the mutable state that it reads, likewise.
            batch: the batch leaves.
            keys: for each replica the random key.
        """
        parts = [
            slicer.slice(batch, stage.batch, self._slicing) if local else []
            for stage, slicer, local in zip(
                self.split.stages, self._slicers, self._is_local, strict=True
            )
        ]
        feed = Feed(self, parts, [keys[replica] for replica in self._where])
        return self._executor.step(self._new_run(weights, model), feed)

    def _new_run(self, weights: Sequence[Sequence[Any]], model: Sequence[Sequence[Any]]) -> Run:
        """A run that holds the weights for one step."""
        stages = [
            StageState(
                LastingState(tuple(weights[at]), (), dict(zip(stage.state, model[at], strict=True)))
                if self._is_local[at]
                else LastingState((), (), {})
            )
            for at, stage in enumerate(self.split.stages)
        ]
        return Run(stages, [WorkerTally(0) for _ in stages], tuple(range(len(stages))))
