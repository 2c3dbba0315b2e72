"""The object that a training loop holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from typing import Any, Literal

import jax
import optax

from pdjax.errors import BrokenPipelineError
from pdjax.pipeline.arguments import (
    check_machines,
    check_optimizer,
    check_option,
    check_remat,
    check_rng,
    choose_num_chunks,
    choose_num_microbatches,
    choose_placements,
    one_of,
    read_plan,
    read_profile,
    read_schedule,
    read_topology,
    stage_wishes,
)
from pdjax.pipeline.prepared import Prepared, profile_model
from pdjax.pipeline.program_cache import DEFAULT_BOUND
from pdjax.pipeline.settings import Settings
from pdjax.pipeline.state import PipelineState, Training
from pdjax.pipeline.user_arrays import gather, origins_of
from pdjax.plan import Plan
from pdjax.profile.profile import Profile
from pdjax.runtime import recorder as recording
from pdjax.runtime.counters import Counts, StageMemory, count, stage_memory
from pdjax.schedules import Schedule
from pdjax.schedules.weight_rule import WeightRule
from pdjax.simulate import Comparison, simulate
from pdjax.split.differentiate import Remat
from pdjax.timeline.timeline import Timeline
from pdjax.topology.topology import Topology
from pdjax.trace.jit import Values

_log = logging.getLogger("pdjax")

Metrics = dict[str, Any]
"""``"loss"`` and what else the loss function reports, as arrays that become ready later."""


class Pipeline:
    """Trains an unmodified loss function on several devices as a pipeline.

    Example:
        >>> import jax, jax.numpy as jnp, optax, pdjax
        >>> def loss_fn(params, batch, rng):
        ...     hidden = jnp.tanh(batch["x"] @ params["first"]["w"])
        ...     return jnp.mean((hidden @ params["second"]["w"] - batch["y"]) ** 2)
        >>> params = {"first": {"w": jnp.ones((3, 4))}, "second": {"w": jnp.ones((4, 1))}}
        >>> batch = {"x": jnp.ones((8, 3)), "y": jnp.ones((8, 1))}
        >>> pipe = pdjax.Pipeline(loss_fn, optax.sgd(0.1), num_stages=2, num_microbatches=4)
        >>> state = pipe.init(params, batch)
        >>> state, metrics = pipe.step(state, batch)
        >>> round(float(metrics["loss"]), 2)
        8.88
        >>> pipe.stage_of_parameters()
        {'first': {'w': 0}, 'second': {'w': 1}}

    Where there are several processes (see `pdjax.distributed`) all make the same calls in the same
    order, with the same arguments, also those that run no stage; every one gets the metrics, the
    parameters and the timeline. Only what `reads` leaves out need not be there.

    Args:
        loss_fn: ``loss_fn(params, batch, rng)`` that returns ``loss`` or ``(loss, metrics)``. The
            loss is the mean over the batch's examples. If `init` is given a mutable state:
            ``loss_fn(params, model_state, batch, rng)`` that returns ``(loss, new_state)`` or
            ``(loss, (new_state, metrics))``. The `rng` may be left out.
        optimizer: an optax optimizer.
        schedule: the name of an algorithm (``"model_parallel"``, ``"gpipe"``, ``"one_f_one_b"``,
            ``"interleaved"``, ``"zero_bubble_h1"``, ``"zero_bubble_v"``, and, asynchronous,
            ``"pipedream"``, ``"pipedream_vertical_sync"``, ``"pipedream_2bw"``), a `Schedule`, or
            the path of one as a text file. ``"auto"`` measures the layers, simulates all schedules,
            and takes the fastest that fits into memory.
        allow_stale: whether ``schedule="auto"`` may take an asynchronous one, whose gradients are
            applied to newer weights than they were computed with.
        num_stages: number of stages; if not given, what the plan says.
        num_chunks: stages on each device under ``"interleaved"``; if not given, 2, as under
            ``"zero_bubble_v"``.
        replicate: whether ``plan="auto"`` may give a stage several devices, its replicas, under
            ``"one_f_one_b"`` and ``"pipedream"``: microbatches go to the replicas in turns, and
            their gradients are averaged. Under an asynchronous schedule
            one update is then made for as many minibatches as a stage has replicas. With
            ``schedule="auto"`` the others are compared without replicas, on as many devices. If
            not given, False in one process, whose devices share its memory and, on a CPU, its
            cores, and True where the run has several processes, which bring machines of their
            own.
        slack: forward passes that each stage does beyond the smallest warm-up, under
            ``"one_f_one_b"``, ``"pipedream"``, ``"pipedream_vertical_sync"`` and
            ``"pipedream_2bw"``. They hide transfers, and cost memory and, under asynchronous
            schedules, staleness. If not given, an automatic plan or schedule chooses it by
            simulation, a `Plan` has its own, and it is 0 with any other plan.
        update_lag: rounds by which stages with replicas make their updates late under
            ``"pipedream"``, which hides the all-reduce behind computing, and costs a version of
            the weights. If not given, as for `slack`.
        num_microbatches: how many microbatches a minibatch is divided into; if not given, 1 for
            ``"pipedream"``, else as many as divide it evenly, up to four for each device.
        devices: where the stages are placed, one each, as devices or shardings; `jax.devices()`
            if not given, those of all processes. With ``jax.local_devices()`` a process is alone.
        plan: where the model is cut. ``"auto"``, what is done if it is not given: the layers are
            measured on the first device, and the planner finds the fastest pipeline that
            fits; if `num_stages` is not given, it may use fewer devices than there are. Where
            devices run several stages each, these are made equally long. What was
            measured is kept beside JAX's compilation cache, if there is one.
            ``"balanced"``: stages of about equal work, estimated from shapes. Or a `Plan`, the
            path of one, or the names of the layers or modules that begin the second, third, …
            stage.
        topology: for ``plan="auto"``: how the devices are joined, as a `Topology` or its text
            form; measured if not given.
        profile: for ``plan="auto"``: a `Profile` of the model or the path of one, in the place of
            a measurement.
        eval_loss_fn: what `evaluate` computes, with the signature of `loss_fn`; `loss_fn` if not
            given. Use it to switch dropout off.
        batch_axes: the axis of the batch leaves that counts examples: a number, or a pytree of
            numbers that is a prefix of the batch, with None for leaves that every microbatch
            gets whole.
        weighted_loss: whether `loss_fn` returns a pair ``(sum, weight)`` in the place of the
            loss. The loss of a minibatch is then the sum of all sums over the sum of all weights,
            which is right for masked examples. The weight is not differentiated.
        remat: what the backward passes recompute: ``"none"``, ``"full"`` or a `jax.checkpoint`
            policy; for all stages, or a sequence with one for each. If not given, as the plan says:
            nothing, but where memory would not suffice.
        weight_rule: which version of the weights the passes read; if not given, that of the
            algorithm, also of a `Schedule` that has its name; of others `LATEST` if they are
            flushed, else `STASH`.
        state_update: whether the mutable state changes with every ``"microbatch"``, in order, or
            once a ``"minibatch"``, by the mean of what its microbatches make of it (as GPipe
            keeps the moving averages of BatchNorm).
        run_ahead: how many steps may be outstanding: before the next one is dispatched, the loss
            of the oldest is waited for and checked. If not given, 8, and under asynchronous
            schedules as many more as there are stages. Each of them holds its batch.
        nonfinite: ``"raise"`` to stop with `NonFiniteLossError` when a loss is NaN or infinite,
            or ``"ignore"``.
        max_batch_shapes: how many batch shapes the compiled programs are kept for, and as many for
            evaluations; the least recently used ones are compiled again when they come back
            (`counts` has the number of these recompilations).

    Raises:
        ValueError: if the arguments do not fit each other; the text says what to change.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        optimizer: optax.GradientTransformation,
        *,
        schedule: str | Schedule | PathLike[str] = "one_f_one_b",
        num_stages: int | None = None,
        num_chunks: int | None = None,
        replicate: bool | None = None,
        slack: int | None = None,
        update_lag: int | None = None,
        num_microbatches: int | None = None,
        devices: Sequence[Any] | None = None,
        plan: Plan | str | PathLike[str] | Sequence[str] | None = None,
        topology: Topology | str | None = None,
        profile: Profile | str | PathLike[str] | None = None,
        eval_loss_fn: Callable[..., Any] | None = None,
        batch_axes: Any = 0,
        weighted_loss: bool = False,
        remat: Remat | Sequence[Remat] | None = None,
        allow_stale: bool = False,
        weight_rule: WeightRule | None = None,
        state_update: Literal["microbatch", "minibatch"] = "microbatch",
        run_ahead: int | None = None,
        nonfinite: Literal["raise", "ignore"] = "raise",
        max_batch_shapes: int = DEFAULT_BOUND,
    ) -> None:
        check_optimizer(optimizer)
        check_remat(remat)
        schedule = read_schedule(schedule)
        chosen = read_plan(plan)
        machines, figures = read_topology(topology), read_profile(profile)
        check_machines(chosen, machines, figures, schedule)
        chunks = choose_num_chunks(schedule, num_chunks)
        wishes = stage_wishes(schedule, num_stages, chosen, remat)
        placements, count = choose_placements(schedule, wishes, chunks, devices, chosen)
        self._settings = Settings(
            loss_fn=loss_fn,
            optimizer=optimizer,
            schedule=schedule,
            weight_rule=weight_rule,
            placements=placements,
            devices_given=devices is not None,
            num_stages=count,
            num_chunks=num_chunks,
            replicate=replicate,
            slack=check_option("slack", slack, schedule),
            update_lag=check_option("update_lag", update_lag, schedule),
            num_microbatches=choose_num_microbatches(schedule, num_microbatches),
            plan=chosen,
            topology=machines,
            profile=figures,
            eval_loss_fn=eval_loss_fn or loss_fn,
            batch_axes=batch_axes,
            weighted_loss=weighted_loss,
            remat=remat,
            state_update=one_of("state_update", state_update, ("microbatch", "minibatch")),
            allow_stale=allow_stale,
            run_ahead=run_ahead,
            nonfinite=one_of("nonfinite", nonfinite, ("raise", "ignore")),
            max_batch_shapes=max_batch_shapes,
        )
        self._latest: Training | None = None
        self._timeline: Timeline | None = None
        if run_ahead is not None and run_ahead < 1:
            raise ValueError(f"run_ahead={run_ahead}; expected at least 1 step.")
        if max_batch_shapes < 1:
            raise ValueError(f"max_batch_shapes={max_batch_shapes}; expected at least 1.")

    # -------- training

    def init(
        self, params: Any, batch: Any, *, model_state: Any = None, rng: Any = None
    ) -> PipelineState:
        """Traces, plans, compiles and places the model.

        In several processes it returns when all of them are ready.

        Args:
            params: pytree of parameters, which is copied; or a function without arguments that
                makes it, such as ``lambda: model.init(key, x)["params"]``. Each stage then makes
                its own, on its own device, and nowhere are all of them at once.
            batch: a minibatch, or its shapes; later ones must have the same structure, and may
                have other shapes.
            model_state: mutable collections such as BatchNorm statistics, if `loss_fn` takes
                them; or a function that makes them.
            rng: the base random key, `jax.random.key(0)` if not given. Microbatch number k,
                counted from the first step on, gets ``jax.random.fold_in(rng, k)``, whatever the
                schedule and the number of stages.

        Raises:
            ValueError: if the loss function, its shapes, the plan, the schedule and the optimizer
                cannot work together; the text says why and what to change.
        """
        rng = jax.random.key(0) if rng is None else rng
        check_rng(rng)
        prepared = Prepared(self._settings, params, batch, model_state, rng)
        training = Training(
            owner=self,
            prepared=prepared,
            param_origins=origins_of(params),
            model_state_origins=origins_of(model_state),
            raises=self._settings.nonfinite == "raise",
        )
        self._latest = training
        _log.info("schedule %s\n%s", self.schedule.name, self.plan)
        run = prepared.start(params, model_state)
        if prepared.peers is not None:  # else the first step would wait for who compiles longest
            prepared.peers.exchange("ready to train", None)
        return PipelineState(training, run, 0)

    def step(self, state: PipelineState, batch: Any) -> tuple[PipelineState, Metrics]:
        """Hands over one minibatch and returns without waiting for it.

        Args:
            state: what `init`, or the step before, returned. It cannot be used again.
            batch: pytree of arrays. They are copied. Where stages are in several processes, leaves
                that no stage of this process reads (see `reads`) may be shapes.

        Returns:
            The new state, and the metrics of this minibatch: ``"loss"``, and those of `loss_fn`
            by their names (under ``"aux"`` if they are not a dict). Over the microbatches, real
            metrics and conditions are averaged, integers summed, and those with a batch axis
            concatenated.

        Raises:
            ValueError: if the batch has another structure than the one given to `init`, does not
                divide into microbatches, or `state` was used before.
            NonFiniteLossError: if the loss of an earlier step is NaN or infinite. `state` is
                still good then.
            BrokenPipelineError: if an earlier step failed on a device.
            ClusterError: if another process has ended that does not make this call.
        """
        training = self._training_of(state)
        training.check_losses(at_most=self._allowed_ahead - 1)
        feed = training.prepared.feed(state.run, batch)
        with (
            training.together("step"),
            training.breaking_on(BaseException, state.step),
        ):
            run = state.take()
            loss, metrics = training.prepared.executor.step(run, feed)
            training.losses.append((state.step, loss))
            new_state = PipelineState(training, run, state.step + 1)
        return new_state, _as_metrics(loss, metrics, feed.passes.split.traced.metrics_tree)

    def drain(self, state: PipelineState) -> PipelineState:
        """Finishes the minibatches in flight, so that all stages have seen the same ones.

        Waits for the losses of all minibatches handed over. Under a synchronous schedule nothing
        ever is in flight between steps. Steps may follow; the pipeline then fills again. `state`
        cannot be used again.

        Raises:
            NonFiniteLossError: if one of these losses is NaN or infinite. `state` is still good
                then.
            BrokenPipelineError: if an earlier step failed on a device.
            ClusterError: if another process has ended that does not make this call.
        """
        training = self._training_of(state)
        training.check_losses(at_most=0)
        # With a flush in every step nothing is in flight, and no process waits.
        prepared = training.prepared
        together = nullcontext() if prepared.schedule.flushes else training.together("drain")
        with together, training.breaking_on(BaseException, state.step):
            run = state.take()
            prepared.executor.drain(run)
            return PipelineState(training, run, state.step)

    def evaluate(self, state: PipelineState, batch: Any, *, num_microbatches: int = 1) -> Metrics:
        """Computes the loss and the metrics of a batch of any size, forward only.

        It reads every stage's newest weights, and changes nothing.

        Args:
            state: the state; it can be used again.
            batch: pytree of arrays in the structure that `init` was given. A random key, if the
                function takes one, is the base key.
            num_microbatches: how many microbatches the batch is divided into, so that the stages
                work at the same time (`pdjax.schedules.forward_only`). Their results are put
                together as those of `step` are.

        Raises:
            ValueError: if the batch has another structure, or does not divide.
            BrokenPipelineError: if an earlier step failed on a device.
            ClusterError: if another process has ended that does not make this call.
        """
        if num_microbatches < 1:
            raise ValueError(f"num_microbatches={num_microbatches}; expected at least 1.")
        training = self._training_of(state)
        with training.together("evaluate"):
            return _as_metrics(*training.prepared.evaluate(state.run, batch, num_microbatches))

    # -------- planning

    def profile(
        self, params: Any, batch: Any, *, model_state: Any = None, rng: Any = None
    ) -> Profile:
        """Measures the layers of the model on the first device, to plan for any machines.

        A profile of the same model and shapes that was kept (see `plan` in `Pipeline`) is returned
        as it is; `pdjax.profile.measure.measure` always measures.

        Example:
            >>> import jax.numpy as jnp, optax, pdjax
            >>> def loss_fn(params, batch):
            ...     return jnp.mean((jnp.tanh(batch @ params["first"]) @ params["second"]) ** 2)
            >>> params = {"first": jnp.ones((3, 4)), "second": jnp.ones((4, 1))}
            >>> pipe = pdjax.Pipeline(loss_fn, optax.sgd(0.1), schedule="pipedream")
            >>> profile = pipe.profile(params, jnp.ones((8, 3)))
            >>> profile.names
            ('first', 'second')
            >>> machines = pdjax.Topology.parse("4x2@10GB/s,1.25GB/s:16GiB")
            >>> plan = pdjax.plan_pipeline(profile, machines)

        Args:
            params: pytree of parameters, or their shapes; as for `init`.
            batch: a minibatch, or its shapes. The profile is for one of its microbatches.
            model_state: mutable collections, if `loss_fn` takes them.
            rng: a random key; `jax.random.key(0)` if not given.

        Raises:
            ValueError: if the arguments and the loss function do not fit each other.
            RuntimeError: if a layer does not run, for lack of memory for example.
        """
        rng = jax.random.key(0) if rng is None else rng
        check_rng(rng)
        return profile_model(self._settings, params, batch, model_state, rng)

    # -------- what was learned

    def params(self, state: PipelineState) -> Any:
        """A copy of each stage's newest parameters, in the structure that `init` was given.

        Each leaf comes back where it came from: to the host if it was a numpy array, else to its
        device. A model that fits on no single device is best handed in as numpy arrays.

        Waits for them. Under an asynchronous schedule, `drain` first to have all stages at the
        same minibatch.

        Raises:
            NonFiniteLossError: if a loss that was not checked yet is NaN or infinite. Calling
                again returns the parameters all the same.
            BrokenPipelineError: if an earlier step failed on a device.
            ClusterError: if another process has ended that does not make this call.
        """
        training = self._training_of(state)
        training.check_losses(at_most=0)
        with training.together("params"), training.breaking_on(Exception, state.step):
            weights = training.prepared.weights.everywhere(state.run)
            return gather(training.param_origins, weights)

    def model_state(self, state: PipelineState) -> Any:
        """A copy of the mutable state, in the structure that `init` was given.

        Raises:
            BrokenPipelineError: if an earlier step failed on a device.
            ClusterError: if another process has ended that does not make this call.
        """
        training = self._training_of(state)
        with (
            training.together("model_state"),
            training.breaking_on(Exception, state.step),
        ):
            model = training.prepared.model.everywhere(state.run)
            return gather(training.model_state_origins, model)

    def stage_of_parameters(self) -> Any:
        """The number of the stage that holds each parameter, in the structure of the parameters.

        A parameter that several stages hold (tied weights) has a tuple of numbers. Like `plan` and
        `schedule` it tells of the last `init`.
        """
        training = self._last_training()
        homes = training.prepared.split.homes
        leaves = [stages[0] if len(stages) == 1 else stages for stages in homes]
        return jax.tree.unflatten(jax.tree.structure(training.param_origins), leaves)

    def reads(self) -> Any:
        """For each batch leaf whether this process needs it, in the structure of the batch.

        Where stages are in several processes, each reads only what its own stages read.
        """
        return self._last_training().prepared.reads

    @property
    def plan(self) -> Plan:
        """Which layers make up which stage."""
        return self._last_training().prepared.plan

    @property
    def schedule(self) -> Schedule:
        """What every worker does in a step: the very object that was validated and is run."""
        return self._last_training().prepared.schedule

    @property
    def comparison(self) -> Comparison | None:
        """Under ``schedule="auto"`` the schedules that it was chosen from, a table if printed."""
        return self._last_training().prepared.comparison

    def memory(self, state: PipelineState) -> tuple[StageMemory, ...]:
        """What each stage has held at its peak, for batches of the last shape, since `init`.

        Of stages in other processes it knows nothing.
        """
        training = self._training_of(state)
        return stage_memory(state.run.passes or training.prepared.passes, state.run)

    def counts(self, state: PipelineState) -> Counts:
        """What was done since `init`: actions, bytes sent, and the most that was held.

        It is counted always, and waits for nothing; each process counts what it does itself.
        """
        prepared, run = self._training_of(state).prepared, state.run
        return count(run.passes or prepared.passes, run, prepared.num_recompilations)

    def simulate(
        self,
        profile: Profile,
        topology: Topology | str | None = None,
        *,
        num_minibatches: int = 1,
    ) -> Timeline:
        """What would happen when, if the stages took what a profile says.

        Bytes are those of the compiled stages, so that what is held and sent is what `counts`
        counts. Like `plan` it is about the last `init`.

        Args:
            profile: the model's figures, as `Pipeline.profile` returns them.
            topology: how the devices are joined; transfers take no time if not given.
            num_minibatches: how many steps are simulated, with the drain after the last one.

        Raises:
            ValueError: if the profile is another model's.
        """
        prepared = self._last_training().prepared
        return simulate(
            prepared.schedule,
            prepared.stage_costs(profile),
            read_topology(topology),
            rule=prepared.rule,
            num_minibatches=num_minibatches,
        )

    @contextmanager
    def record(self, state: PipelineState) -> Iterator[None]:
        """Measures when every program of the steps inside the ``with`` runs.

        `state` is that of the first of these steps; it is only looked at. Leaving the ``with``
        waits for all of them; `timeline` then tells, in every process. Recording costs a little
        time.
        """
        prepared = self._training_of(state).prepared
        executor, peers = prepared.executor, None
        weights = [held.lasting.weights[0] for held in state.run.stages if held.lasting.weights]
        recorder = recording.Recorder(executor.schedule, weights)
        executor.observer = recorder.observe
        try:
            yield
            peers = prepared.peers  # an error would have come in this process alone
        finally:
            executor.observer = None
            events = recorder.finish()
            if peers is not None:
                events = recording.gather(peers, events)
            self._timeline = recording.timeline_of(prepared.schedule, events)

    def timeline(self) -> Timeline:
        """When every program ran during the last `record`."""
        if self._timeline is None:
            raise ValueError(
                "nothing was recorded; run some steps inside 'with pipe.record(state):'."
            )
        return self._timeline

    # -------- looking after itself

    @property
    def _allowed_ahead(self) -> int:
        if self._settings.run_ahead is not None:
            return self._settings.run_ahead
        # Fewer cost time where steps are short: the thread sleeps for each loss, and wakes late.
        return 8 if self.schedule.flushes else 8 + self.schedule.num_stages

    def _last_training(self) -> Training:
        if self._latest is None:
            raise ValueError("call Pipeline.init(params, batch) before anything else.")
        return self._latest

    def _training_of(self, state: PipelineState) -> Training:
        """What `state` belongs to, if it can be used."""
        self._last_training()
        if not isinstance(state, PipelineState):
            raise ValueError(
                f"got a {type(state).__name__} in the place of the state; expected what init "
                "returned, or the first of the two values that step returned."
            )
        if state.training.owner is not self:
            raise ValueError("this state belongs to another Pipeline.")
        if state.training.broken is not None:
            raise BrokenPipelineError(
                f"this Pipeline is broken: {state.training.broken}\nCall init again, with "
                "parameters from before the failure."
            )
        _ = state.run
        return state.training


def _as_metrics(loss: Any, leaves: Values, tree: Any) -> Metrics:
    if tree is None:
        return {"loss": loss}
    metrics = jax.tree.unflatten(tree, leaves)
    if not isinstance(metrics, Mapping):
        return {"loss": loss, "aux": metrics}
    return {"loss": loss} | dict(metrics) | {"loss": loss}
