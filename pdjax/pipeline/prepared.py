"""From what a person hands over to something that runs: resolve, split, compile, feed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.communication.all_reduce import MeanOfState, Reduce, find_reduce
from pdjax.communication.ring import Replicas
from pdjax.pipeline.batch import (
    BatchSpec,
    appearance,
    check_structure,
    concatenation_axes,
    describe_batch,
)
from pdjax.pipeline.compiled_costs import compiled_costs
from pdjax.pipeline.feed import InputFeed
from pdjax.pipeline.processes import make_transport, peers_of
from pdjax.pipeline.program_cache import ProgramCache
from pdjax.pipeline.resolve import Example, resolve
from pdjax.pipeline.settings import Settings
from pdjax.profile.cached import measured_profile
from pdjax.profile.profile import Profile
from pdjax.runtime.evaluation import Evaluation
from pdjax.runtime.executor import Executor
from pdjax.runtime.gather import Gather
from pdjax.runtime.init_state import Starter, start_run
from pdjax.runtime.microbatches import MicrobatchSlicer, Slicing
from pdjax.runtime.programs import Passes, PlacedConsts
from pdjax.runtime.replica_map import ReplicaMap
from pdjax.runtime.state import Feed, Run
from pdjax.runtime.update import UpdateRunner
from pdjax.schedules import Schedule
from pdjax.schedules.versions import delay_of, peak_versions
from pdjax.simulate import StageCost
from pdjax.split.optimizer import UpdateSplit, split_update
from pdjax.split.stages import StageSplit, split
from pdjax.trace import jaxprs
from pdjax.trace.jit import Values
from pdjax.trace.layers import LayerGraph
from pdjax.trees import place, shape_of, shapes_of

_log = logging.getLogger("pdjax")

_Programs = tuple[Passes, list[MicrobatchSlicer]]
"""The programs for minibatches of one shape, and for each replica what divides them."""


def profile_model(
    settings: Settings, params: Any, batch: Any, model_state: Any, rng: Any
) -> Profile:
    """Measures the layers of a model on the first device, for one of its microbatches."""
    example = _example(settings, params, batch, model_state, rng)
    settings = settings.for_batch(example.spec.size)
    size = example.spec.size // (settings.num_microbatches or 1)
    graph = example.trace_microbatch(settings)
    device = next(iter(settings.placements[0].device_set))
    return measured_profile(graph, device, size, example.first_microbatch(settings))


def _example(settings: Settings, params: Any, batch: Any, model_state: Any, rng: Any) -> Example:
    params, state = map(shapes_of, (params, model_state))
    return Example(params, state, rng, describe_batch(batch, settings.batch_axes), batch)


class Prepared:
    """A pipeline that is ready to run.

    It is made for parameters, mutable state and minibatches of certain shapes. Minibatches of
    other shapes are traced, split at the same layers and compiled when they come; the programs of
    `max_batch_shapes` shapes are kept, and as many of evaluations.

    Attributes:
        comparison: the schedules that it was chosen from; None if it was given.
        schedule: what a step does.
        rule: which weights a backward pass reads.
        plan: which layers make up which stage.
        split: the loss function, cut into stages.
        update: the optimizer, cut into stages.
        executor: dispatches steps.
        peers: the processes that the stages are in; None if all are in this one.
        transport: how values travel between replicas.
        passes: the programs for minibatches of the shape that the pipeline was prepared for.
        weights: the parameters.
        model: the mutable state.
    """

    def __init__(
        self,
        settings: Settings,
        params: Any,
        batch: Any,
        model_state: Any,
        rng: Any,
    ) -> None:
        self._example = example = _example(settings, params, batch, model_state, rng)
        self._spec = example.spec
        peers = peers_of(settings.placements, chosen_by_user=settings.devices_given)
        sized = settings.for_processes(peers is not None).for_batch(self._spec.size)
        resolved = resolve(sized, example, params, model_state, peers)
        self._settings = settings = resolved.settings
        self.plan, self.schedule, self.rule = resolved.plan, resolved.schedule, resolved.rule
        self.comparison, self._remat = resolved.comparison, resolved.remat
        placements = settings.placements
        self.replicas = ReplicaMap.of(self.schedule)
        self.peers = peers
        self.transport = make_transport(placements, peers)
        self._is_local = self.transport.is_local
        if peers is not None:
            peers.describe(self._local_stages())
        self._feed = InputFeed(
            self.schedule, placements, self._is_local, self._everywhere(rng), self._spec
        )
        self._specs = ProgramCache[BatchSpec](8 * settings.max_batch_shapes)
        self._programs = ProgramCache[_Programs](settings.max_batch_shapes)
        self._evaluations = ProgramCache[Evaluation](settings.max_batch_shapes)
        self._consts = PlacedConsts(placements, self._is_local)
        self.split = split(resolved.graph, self.plan.first_layers)
        self.update = self._split_optimizer()
        self.state_homes = _state_homes(self.split)
        self.weights, self.model = self._gathers()
        self._updates = [self._update_runner(at) for at in range(len(placements))]
        self._reduces = self._make_reduces()
        self.executor = Executor(
            self.schedule,
            self.rule,
            self.transport,
            [self._divisors(at) for at in range(len(placements))],
            _average,
        )
        self.passes = self._compile(self._spec, self.split)
        first = self.passes, self._feed.slicers()
        self._programs.get(self._spec.signature, lambda: first)

    def _local_stages(self) -> str:
        """What this process runs, in words."""
        pairs = zip(self.replicas.stage_of, self._is_local, strict=True)
        said = []
        for stage in sorted({stage for stage, here in pairs if here}):
            names = self.plan.stage_layers(stage)
            said.append(f"stage {stage}: {names[0]}" + f" … {names[-1]}" * (len(names) > 1))
        return "; ".join(said) or "no stage"

    def _gathers(self) -> tuple[Gather, Gather]:
        """The parameters, and the mutable state."""
        shapes = map(jax.tree.leaves, (self._example.params, self._example.state))
        at = [{i: at for at, i in enumerate(stage.params)} for stage in self.update.stages]
        readers = (
            lambda held, stage, index: held.weights[at[stage][index]],
            lambda held, stage, index: held.model[index],
        )
        params, state = (
            Gather(self.replicas, homes, leaves, read, self.transport)
            for homes, leaves, read in zip(
                (self.split.homes, self.state_homes), shapes, readers, strict=True
            )
        )
        return params, state

    def _everywhere(self, value: Any) -> list[Any]:
        """A value at each place of this process; None for the others."""
        pairs = zip(self._settings.placements, self._is_local, strict=True)
        return [place(value, placement) if here else None for placement, here in pairs]

    def _divisors(self, at: int) -> dict[int, Any]:
        """What the sum of so many microbatches' gradients is divided by, at a place."""
        size = self.schedule.per_update[self.replicas.stage_of[at]]
        whole = not self.schedule.flushes and self.schedule.num_microbatches == 1
        placement = self._settings.placements[at]
        if not self._is_local[at]:
            return {}
        counts = range(1 if whole else size, size + 1)  # a drain may break a round off
        return {count: place(np.float32(count), placement) for count in counts}

    def _make_reduces(self) -> dict[int, tuple[Reduce, MeanOfState | None]]:
        """For each stage with replicas what its updates sum and average over them."""
        found: dict[int, tuple[Reduce, MeanOfState | None]] = {}
        params, state = map(jax.tree.leaves, (self._example.params, self._example.state))
        for stage, count in enumerate(self.replicas.num_replicas):
            if count > 1 and any(self._is_local[at] for at in self.replicas.of_stage(stage)):
                at = self.replicas.of_stage(stage)
                where = [self._settings.placements[place] for place in at]
                replicas = Replicas(at, where, self.transport)
                shapes = [params[i] for i in self.update.stages[stage].params]
                kept = {i: state[i] for i in self.split.stages[stage].updates}
                found[stage] = (
                    find_reduce(replicas, shapes),
                    MeanOfState(replicas, kept) if kept else None,
                )
        return found

    def _reduce_lowerings(self) -> Iterator[Callable[[], Any]]:
        for reduces in self._reduces.values():
            for reduce in filter(None, reduces):
                yield from reduce.lowerings()

    def _averages_state(self) -> bool:
        if self._settings.state_update == "microbatch" or self.schedule.num_microbatches == 1:
            return False
        if not self.schedule.flushes:
            raise ValueError(
                "state_update='minibatch' needs a schedule that finishes a minibatch before the "
                f"next one; {self.schedule.name!r} does not. Use state_update='microbatch'."
            )
        return True

    # -------- tracing and compiling

    def _microbatch(self, spec: BatchSpec) -> Any:
        return spec.microbatch(self.schedule.num_microbatches)

    def _graph(self, loss_fn: Callable[..., Any], batch: Any) -> LayerGraph:
        return self._example.trace(self._settings, loss_fn, batch)

    def _split_optimizer(self) -> UpdateSplit:
        traced = self.split.traced
        update = split_update(
            self._settings.optimizer,
            self._example.params,
            self.split.homes,
            traced.param_names,
            self.plan.num_stages,
            rounds=not self.schedule.flushes and max(self.replicas.num_replicas) > 1,
            scales=self._scales(),
        )
        if not self.schedule.flushes:
            _refuse_ties(self.split, self.schedule)
            _refuse_mixing(update, self.schedule)
        return update

    def _scales(self) -> list[float] | None:
        """For each parameter a factor on its learning rate, where the weight rule has some."""
        replicas = self.replicas.num_replicas
        if self.rule.replica_learning_rate == "same" or self.schedule.flushes:
            return None
        return [replicas[homes[0]] / replicas[0] for homes in self.split.homes]

    def _update_runner(self, at: int) -> UpdateRunner:
        """The update at a place; it reuses the old weights if no backward pass still needs them."""
        schedule, rule, stage = self.schedule, self.rule, self.replicas.stage_of[at]
        workers = schedule.unroll((schedule.lag + 2) * schedule.num_minibatches)
        worker = workers[self.replicas.worker_of[at]]
        delay = delay_of(rule, schedule)
        alive = peak_versions(worker, stage, rule, schedule.num_microbatches, delay)
        return UpdateRunner(
            self.update,
            stage,
            self._settings.placements[at],
            donate_weights=alive == 1,
            divisor=_divisor(self.split),
            num_minibatches=self._minibatches_of(stage),
        )

    def _minibatches_of(self, stage: int) -> Callable[[Any], Any]:
        """How many minibatches an update of a stage is for, out of what it divides by.

        A drain may break a round off; of a weighted loss the divisor does not say so.
        """
        if self.split.traced.weight is not None:
            return lambda _: self.replicas.num_replicas[stage]
        return lambda divisor: divisor / self.schedule.num_microbatches

    def _compile(self, spec: BatchSpec, stages: StageSplit) -> Passes:
        m = self.schedule.num_microbatches
        passes = Passes(
            stages,
            self._settings.placements,
            self.schedule,
            self.rule,
            Slicing(m, spec.axes),
            self._remat,
            self._updates,
            self._metric_axes(self._settings.loss_fn, spec, stages, m),
            self._consts.of(stages, self.replicas),
            self._is_local,
            self._averages_state(),
            self._reduces,
        )
        key = shape_of(self._example.key)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            lowerings = [*passes.lowerings(key), *self._reduce_lowerings()]
            done = [pool.submit(lower().compile) for lower in lowerings]
        for compiled in done:
            compiled.result()
        return passes

    def _metric_axes(
        self, loss_fn: Callable[..., Any], spec: BatchSpec, stages: StageSplit, count: int
    ) -> tuple[int | None, ...]:
        """The axes along which metrics are concatenated: those that grow with the batch."""
        metrics = stages.traced.metrics
        if count == 1 or all(jaxprs.aval(atom).shape == () for atom in metrics):
            return (None,) * len(metrics)
        whole = jax.tree.unflatten(spec.tree, spec.shapes)
        traced = self._graph(loss_fn, whole).traced
        return concatenation_axes(
            list(map(jaxprs.aval, metrics)),
            list(map(jaxprs.aval, traced.metrics)),
            count,
        )

    def stage_costs(self, profile: Profile) -> tuple[StageCost, ...]:
        """What the stages cost, with the seconds of a profile."""
        return compiled_costs(self.passes, self._updates, self.plan, self._remat, profile)

    def _spec_of(self, batch: Any) -> BatchSpec:
        spec = describe_batch(batch, self._settings.batch_axes)
        check_structure(spec, self._spec)
        return spec

    def _programs_for(self, spec: BatchSpec) -> _Programs:
        """Traces and compiles for minibatches of another shape."""
        _log.info("compiling for a new batch shape: %s", spec)
        graph = self._graph(self._settings.loss_fn, self._microbatch(spec))
        stages = split(graph, self.plan.first_layers_in(graph.names))
        if (stages.homes, _state_homes(stages)) != (self.split.homes, self.state_homes):
            raise ValueError(
                f"for batches of {spec} the loss function uses its parameters or "
                "its state in other stages than before. Give a plan whose cuts suit both "
                "shapes."
            )
        return self._compile(spec, stages), self._feed.slicers()

    def _evaluation_for(self, spec: BatchSpec, count: int) -> Evaluation:
        """The compiled forward passes for a batch in `count` microbatches."""
        check_structure(spec, self._spec)
        known = (spec.signature, count)
        return self._evaluations.get(known, lambda: self._make_evaluation(spec, count))

    def _make_evaluation(self, spec: BatchSpec, count: int) -> Evaluation:
        loss_fn = self._settings.eval_loss_fn
        graph = self._graph(loss_fn, spec.microbatch(count))
        stages = split(graph, self.plan.first_layers_in(graph.names))
        return Evaluation(
            stages,
            [held[0] for held in map(self.replicas.of_stage, range(self.plan.num_stages))],
            self._settings.placements,
            self._consts.of(stages, self.replicas),
            Slicing(count, spec.axes),
            self._metric_axes(loss_fn, spec, stages, count),
            self.transport,
        )

    # -------- running

    def start(self, params: Any, model_state: Any) -> Run:
        """Places the parameters and makes the optimizer state, each leaf where it lives."""
        starter = Starter(self._settings.optimizer, self._example.params, params, model_state)
        return start_run(
            starter,
            self.update,
            self.state_homes,
            self.replicas,
            [
                p if local else None
                for p, local in zip(self._settings.placements, self._is_local, strict=True)
            ],
            len(self.schedule.workers),
        )

    def feed(self, run: Run, batch: Any) -> Feed:
        """Moves a minibatch to the replicas that read it."""
        leaves, tree = jax.tree.flatten(batch)
        shapes = (tree, *map(appearance, leaves))
        spec = self._specs.get(shapes, lambda: self._spec_of(batch))
        passes, slicers = self._programs.get(spec.signature, lambda: self._programs_for(spec))
        return self._feed.feed(run, passes, slicers, leaves)

    @property
    def num_recompilations(self) -> int:
        """How often programs were compiled again that had been dropped."""
        return self._programs.num_recompilations + self._evaluations.num_recompilations

    @property
    def reads(self) -> Any:
        """For each batch leaf whether a stage of this process reads it."""
        read, count = self._feed.read_by(self.split), len(self._spec.names)
        return jax.tree.unflatten(self._spec.tree, [index in read for index in range(count)])

    def evaluate(self, run: Run, batch: Any, count: int) -> tuple[Any, Values, Any]:
        """Dispatches forward passes; returns the loss, the metrics and their structure."""
        evaluation = self._evaluation_for(describe_batch(batch, self._settings.batch_axes), count)
        leaves = self._feed.taken(evaluation.split, jax.tree.leaves(batch))
        stages = evaluation.split.stages
        weights = [[self.weights.at(run, i, stage.index) for i in stage.params] for stage in stages]
        model = [[self.model.at(run, i, stage.index) for i in stage.state] for stage in stages]
        loss, metrics = evaluation.run(weights, model, leaves, self._feed.keys)
        return loss, metrics, evaluation.metrics_tree


def _refuse_ties(stages: StageSplit, schedule: Schedule) -> None:
    for name, homes in zip(stages.traced.param_names, stages.homes, strict=True):
        if len(homes) > 1:
            raise ValueError(
                f"parameter {name!r} is used by stages {list(homes)}, but under the asynchronous "
                f"schedule {schedule.name!r} its copies would drift apart. Choose cuts that keep "
                "its users in one stage, untie the weights, or use a synchronous schedule such "
                "as 'one_f_one_b'."
            )


def _refuse_mixing(update: UpdateSplit, schedule: Schedule) -> None:
    if update.mixes:
        raise ValueError(
            f"the optimizer mixes stages: {update.mixes}, as clipping by the global norm does. "
            f"Under the asynchronous schedule {schedule.name!r} the stages update at different "
            "times, so this cannot be exact. Clip leaf by leaf (optax.clip, "
            "optax.adaptive_grad_clip), or use a synchronous schedule such as 'one_f_one_b'."
        )


def _divisor(stages: StageSplit) -> jax.ShapeDtypeStruct:
    """What the gradients of a minibatch are divided by: its microbatches, or its weight."""
    weight = stages.traced.weight
    return jax.ShapeDtypeStruct((), jnp.float32 if weight is None else jaxprs.aval(weight).dtype)


def _state_homes(stages: StageSplit) -> tuple[tuple[int, ...], ...]:
    """For each leaf of the mutable state the stages that hold it: its writer, or all readers."""
    homes = []
    for index in range(len(stages.traced.state)):
        writers = tuple(stage.index for stage in stages.stages if index in stage.updates)
        readers = tuple(stage.index for stage in stages.stages if index in stage.state)
        homes.append(writers or readers or (0,))
    return tuple(homes)


@jax.jit
def _average(parts: Sequence[Values]) -> Values:
    """The mean over microbatches of what can be averaged; of the rest the last."""
    return tuple(
        jnp.stack(column).mean(0).astype(column[0].dtype)
        if jnp.issubdtype(column[0].dtype, jnp.inexact)
        else column[-1]
        for column in zip(*parts, strict=True)
    )
