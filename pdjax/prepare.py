"""From what a person hands over to something that runs: trace, plan, split, compile, place."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdjax import jaxprs
from pdjax.arguments import AUTO, taking_key
from pdjax.automatic import measured_profile
from pdjax.batches import BatchSpec, appearance, check_structure, concatenation_axes, describe_batch
from pdjax.choose_plan import make_plan, remat_of
from pdjax.choose_schedule import choose_schedule
from pdjax.compiled_costs import compiled_costs
from pdjax.graph import LayerGraph, build_graph
from pdjax.optimizer import UpdateSplit, init_program, split_update
from pdjax.profile import Profile
from pdjax.program import Program
from pdjax.runtime.evaluation import Evaluation
from pdjax.runtime.executor import Executor
from pdjax.runtime.intake import Intake, Slicing
from pdjax.runtime.passes import Passes, PlacedConsts
from pdjax.runtime.placed import Values, placed
from pdjax.runtime.places import Places
from pdjax.runtime.reduce import AllReduce, MeanOfState
from pdjax.runtime.state import Feed, Run, StageState, WorkerTally
from pdjax.runtime.transport import LocalTransport
from pdjax.runtime.update import UpdateRunner
from pdjax.schedules import Schedule
from pdjax.schedules.versions import delay_of, peak_versions
from pdjax.settings import Settings, make_schedule, place_stages
from pdjax.simulator import Comparison, StageCost
from pdjax.split import StageSplit, split
from pdjax.trees import own_copy, place

_log = logging.getLogger("pdjax")


def profile_model(
    settings: Settings, params: Any, batch: Any, model_state: Any, rng: Any
) -> Profile:
    """Measures the layers of a model on the first device, for one of its microbatches."""
    spec = describe_batch(batch, settings.batch_axes)
    settings = settings.for_batch(spec.size)
    count = settings.num_microbatches or 1
    params, state = jax.eval_shape(lambda: (params, model_state))
    graph = _trace(settings, settings.loss_fn, params, spec.microbatch(count), state, rng)
    device = next(iter(settings.placements[0].device_set))
    return measured_profile(graph, device, spec.size // count, spec.first_microbatch(batch, count))


def _trace(
    settings: Settings, loss_fn: Callable[..., Any], params: Any, batch: Any, state: Any, rng: Any
) -> LayerGraph:
    return build_graph(
        taking_key(loss_fn, state is not None),
        params,
        batch,
        rng,
        model_state=state,
        weighted_loss=settings.weighted_loss,
    )


class Prepared:
    """A pipeline that is ready to run.

    It is made for parameters, mutable state and minibatches of certain shapes. Minibatches of
    other shapes are traced, split at the same layers and compiled when they come.

    Attributes:
        comparison: the schedules that it was chosen from; None if it was given.
        schedule: what a step does.
        rule: which weights a backward pass reads.
        plan: which layers make up which stage.
        split: the loss function, cut into stages.
        update: the optimizer, cut into stages.
        executor: dispatches steps.
    """

    def __init__(
        self, settings: Settings, params: Any, batch: Any, model_state: Any, rng: Any
    ) -> None:
        self._spec = describe_batch(batch, settings.batch_axes)
        self._settings = settings = settings.for_batch(self._spec.size)
        self._params, self._state = jax.eval_shape(lambda: (params, model_state))
        self._key = rng
        graph = self._graph(settings.loss_fn, self._spec.microbatch(settings.num_microbatches or 1))
        example = self._spec.first_microbatch(batch, settings.num_microbatches or 1)
        self.comparison: Comparison | None = None
        if settings.schedule == AUTO:
            settings, self.comparison = choose_schedule(
                settings, graph, self._spec, self._params, example
            )
            if settings.num_microbatches != self._settings.num_microbatches:
                count = settings.num_microbatches or 1
                graph = self._graph(settings.loss_fn, self._spec.microbatch(count))
                example = self._spec.first_microbatch(batch, count)
        self.plan = make_plan(settings, graph, self._spec, self._params, example)
        self._settings = settings = settings.for_plan(self.plan)
        self._remat = remat_of(settings, self.plan)
        self.schedule, self.rule = make_schedule(settings)
        placements = place_stages(self.plan, self.schedule, settings.placements)
        self._settings = settings = replace(settings, placements=tuple(placements))
        self.places = Places.of(self.schedule)
        self._keys = [place(rng, placement) for placement in settings.placements]
        self._passes: dict[Any, Passes] = {}
        self._known: dict[Any, Passes] = {}
        self._evaluations: dict[Any, Evaluation] = {}
        self._consts = PlacedConsts(settings.placements)
        self.split = split(graph, self.plan.first_layers)
        self.update = self._split_optimizer()
        self.state_homes = _state_homes(self.split)
        self._updates = [self._update_runner(at) for at in range(len(placements))]
        self._reduces = self._make_reduces()
        self.executor = Executor(
            self.schedule,
            self.rule,
            self._updates,
            [self._divisors(at) for at in range(len(placements))],
            LocalTransport(),
            _average if self._averages_state() else None,
            self._reduces,
        )
        # Under an asynchronous schedule a batch may be read after the step that brought it has
        # returned, when its owner may have given its memory away.
        self._intakes = [
            Intake(placement, keeps_in_place=self.schedule.flushes)
            for placement in settings.placements
        ]
        self._passes[self._spec.signature] = self._compile(self._spec, self.split)

    def _divisors(self, at: int) -> dict[int, Any]:
        """What the sum of so many microbatches' gradients is divided by, at a place."""
        size = self.schedule.per_update[self.places.stage_of[at]]
        whole = not self.schedule.flushes and self.schedule.num_microbatches == 1
        placement = self._settings.placements[at]
        counts = range(1 if whole else size, size + 1)  # a drain may break a round off
        return {count: place(np.float32(count), placement) for count in counts}

    def _make_reduces(self) -> dict[int, tuple[AllReduce, MeanOfState | None]]:
        """For each stage with replicas what its updates sum and average over them."""
        found: dict[int, tuple[AllReduce, MeanOfState | None]] = {}
        params, state = jax.tree.leaves(self._params), jax.tree.leaves(self._state)
        for stage, count in enumerate(self.places.replicas):
            if count > 1:
                where = [self._settings.placements[at] for at in self.places.of_stage(stage)]
                shapes = [params[i] for i in self.update.stages[stage].params]
                kept = {i: state[i] for i in self.split.stages[stage].updates}
                found[stage] = (
                    AllReduce(where, shapes),
                    MeanOfState(where, kept) if kept else None,
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
        return _trace(self._settings, loss_fn, self._params, batch, self._state, self._key)

    def _split_optimizer(self) -> UpdateSplit:
        traced = self.split.traced
        update = split_update(
            self._settings.optimizer,
            self._params,
            self.split.homes,
            traced.param_names,
            self.plan.num_stages,
        )
        if not self.schedule.flushes:
            _refuse_ties(self.split, self.schedule)
            _refuse_mixing(update, self.schedule)
        return update

    def _update_runner(self, at: int) -> UpdateRunner:
        """The update at a place; it reuses the old weights if no backward pass still needs them."""
        schedule, rule, stage = self.schedule, self.rule, self.places.stage_of[at]
        workers = schedule.unroll((schedule.lag + 2) * schedule.num_minibatches)
        worker = workers[self.places.worker_of[at]]
        delay = delay_of(rule, schedule)
        alive = peak_versions(worker, stage, rule, schedule.num_microbatches, delay)
        return UpdateRunner(
            self.update,
            stage,
            self._settings.placements[at],
            donate_weights=alive == 1,
            divisor=_divisor(self.split),
        )

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
            self._consts.of(stages, self.places),
        )
        key = jax.ShapeDtypeStruct(jnp.shape(self._key), self._key.dtype)
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

    @property
    def passes(self) -> Passes:
        """The programs for minibatches of the shape that the pipeline was prepared for."""
        return self._passes[self._spec.signature]

    def _passes_for(self, spec: BatchSpec) -> Passes:
        check_structure(spec, self._spec)
        if spec.signature not in self._passes:
            _log.info("compiling for a new batch shape: %s", spec)
            graph = self._graph(self._settings.loss_fn, self._microbatch(spec))
            stages = split(graph, self.plan.first_layers_in(graph.names))
            if (stages.homes, _state_homes(stages)) != (self.split.homes, self.state_homes):
                raise ValueError(
                    f"for batches of {spec} the loss function uses its parameters or "
                    "its state in other stages than before. Give a plan whose cuts suit both "
                    "shapes."
                )
            self._passes[spec.signature] = self._compile(spec, stages)
        return self._passes[spec.signature]

    def _evaluation_for(self, spec: BatchSpec, count: int) -> Evaluation:
        check_structure(spec, self._spec)
        known = (spec.signature, count)
        if known not in self._evaluations:
            loss_fn = self._settings.eval_loss_fn
            first = [held[0] for held in map(self.places.of_stage, range(self.plan.num_stages))]
            graph = self._graph(loss_fn, spec.microbatch(count))
            stages = split(graph, self.plan.first_layers_in(graph.names))
            consts = self._consts.of(stages, self.places)
            self._evaluations[known] = Evaluation(
                stages,
                [self._settings.placements[at] for at in first],
                tuple(consts[at] for at in first),
                Slicing(count, spec.axes),
                self._metric_axes(loss_fn, spec, stages, count),
            )
        return self._evaluations[known]

    # -------- running

    def start(self, params: Any, model_state: Any) -> Run:
        """Places the parameters and makes the optimizer state, each leaf where it lives."""
        leaves, state = jax.tree.leaves(params), jax.tree.leaves(model_state)
        program, _ = init_program(self._settings.optimizer, self._params)
        stages = []
        for stage, placement in zip(self.places.stage_of, self._settings.placements, strict=True):
            mine = self.update.stages[stage]
            weights = tuple(place(leaves[i], placement) for i in mine.params)
            wanted = tuple(program.outvars[i] for i in mine.state)
            kept = jaxprs.needed(program.equations, wanted)
            init = Program(tuple(program.equations[i] for i in kept), {"state": wanted})
            at_hand = dict(zip((program.invars[i] for i in mine.params), weights, strict=True))
            values = dict(zip(program.invars, leaves, strict=True)) | at_hand
            values |= zip(program.constvars, program.consts, strict=True)
            reads = init.reads
            make = placed(
                lambda read, init=init, reads=reads: init.run(dict(zip(reads, read, strict=True)))[
                    "state"
                ],
                placement,
            )
            model = {
                i: place(leaf, placement)
                for i, (leaf, homes) in enumerate(zip(state, self.state_homes, strict=True))
                if stage in homes
            }
            stages.append(StageState(weights, make(tuple(values[var] for var in reads)), model))
        workers = [
            WorkerTally(
                sum(
                    held.weight_bytes
                    for held, where in zip(stages, self.places.worker_of, strict=True)
                    if where == worker
                )
            )
            for worker in range(len(self.schedule.workers))
        ]
        return Run(stages, workers)

    def feed(self, run: Run, batch: Any) -> Feed:
        """Moves a minibatch to the places that read it, to each the microbatches that it runs."""
        leaves, tree = jax.tree.flatten(batch)
        shapes = (tree, *map(appearance, leaves))
        if shapes not in self._known:
            spec = describe_batch(batch, self._settings.batch_axes)
            self._known[shapes] = self._passes_for(spec)
        passes = self._known[shapes]
        leaves = [own_copy(leaf) for leaf in leaves]
        moved = []
        for at, intake in enumerate(self._intakes):
            stage = self.places.stage_of[at]
            count = self.places.replicas[stage]
            number = at - self.places.of_stage(stage)[0]
            first = (number - (run.fed - run.start) % self.schedule.cycle) % count
            turns = range(first, self.schedule.num_microbatches, count)
            indices = passes.split.stages[stage].batch
            moved.append(intake.take(leaves, indices, passes.slicing, turns))
        return Feed(passes, moved, self._keys)

    def evaluate(self, run: Run, batch: Any, count: int) -> tuple[Any, Values, Any]:
        """Dispatches forward passes; returns the loss, the metrics and their structure."""
        evaluation = self._evaluation_for(describe_batch(batch, self._settings.batch_axes), count)
        leaves = [own_copy(leaf) for leaf in jax.tree.leaves(batch)]
        loss, metrics = evaluation.run(self.weights(run), self.model(run), leaves, self._keys[0])
        return loss, metrics, evaluation.metrics_tree

    def weights(self, run: Run) -> dict[int, Any]:
        """The newest version of each parameter leaf, by index."""
        found: dict[int, Any] = {}
        for stage, mine in enumerate(self.update.stages):
            state = run.stages[self.places.of_stage(stage)[0]]
            for index, leaf in zip(mine.params, state.weights, strict=True):
                found.setdefault(index, leaf)
        return found

    def model(self, run: Run) -> dict[int, Any]:
        """Each leaf of the mutable state, by index."""
        first = {stage: self.places.of_stage(stage)[0] for stage in range(self.plan.num_stages)}
        return {i: run.stages[first[homes[0]]].model[i] for i, homes in enumerate(self.state_homes)}


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
