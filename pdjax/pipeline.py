"""The object that a training loop holds."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding, SingleDeviceSharding

from pdjax.differentiate import Remat
from pdjax.errors import BrokenPipelineError, NonFiniteLossError
from pdjax.planner import Plan
from pdjax.prepare import Prepared, Settings
from pdjax.runtime.executor import Run
from pdjax.runtime.placed import Values
from pdjax.runtime.recorder import Recorder
from pdjax.schedules import Schedule, find_algorithm
from pdjax.timeline import Timeline
from pdjax.trees import is_key
from pdjax.weights import WeightRule

_log = logging.getLogger("pdjax")

Metrics = dict[str, Any]
"""``"loss"`` and what else the loss function reports, as arrays that become ready later."""


class PipelineState:
    """Everything that training changes: weights, optimizer state, what is in flight.

    Made by `Pipeline.init`, passed on by `Pipeline.step` and `Pipeline.drain`. Each may be used
    once: a step reuses the memory of the state that it is given.

    Attributes:
        step: number of minibatches handed over so far.
    """

    def __init__(
        self, owner: Pipeline, run: Run, step: int, losses: deque[tuple[int, Any]]
    ) -> None:
        self.step = step
        self._owner = owner
        self._run: Run | None = run
        self._losses = losses

    @property
    def run(self) -> Run:
        """What the executor holds.

        Raises:
            ValueError: if the state was used before.
        """
        if self._run is None:
            raise ValueError(
                f"this state (step {self.step}) was used before, and the step that used it "
                "reused its memory. Go on with the state that it returned: "
                "state, metrics = pipe.step(state, batch)."
            )
        return self._run

    def __repr__(self) -> str:
        used = "" if self._run else ", used"
        return f"PipelineState(step={self.step}{used})"


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

    Args:
        loss_fn: ``loss_fn(params, batch, rng)`` that returns ``loss`` or ``(loss, metrics)``. The
            loss is the mean over the batch's examples. If `init` is given a mutable state:
            ``loss_fn(params, model_state, batch, rng)`` that returns ``(loss, new_state)`` or
            ``(loss, (new_state, metrics))``. The `rng` may be left out.
        optimizer: an optax optimizer.
        schedule: the name of an algorithm (``"model_parallel"``, ``"gpipe"``, ``"one_f_one_b"``,
            ``"pipedream"``), or a `Schedule`.
        num_stages: number of stages; one for each device if not given.
        num_microbatches: how many microbatches a minibatch is divided into; if not given, 1 for
            ``"pipedream"``, else as many as divide it evenly, up to four for each stage.
        devices: where the stages are placed, one each, as devices or shardings; `jax.devices()`
            if not given.
        plan: where the model is cut: a `Plan`, or the names of the layers or modules that begin
            the second, third, … stage. If not given, stages of about equal estimated work.
        eval_loss_fn: what `evaluate` computes, with the signature of `loss_fn`; `loss_fn` if not
            given. Use it to switch dropout off.
        batch_axes: the axis of the batch leaves that counts examples: a number, or a pytree of
            numbers that is a prefix of the batch, with None for leaves that every microbatch
            gets whole.
        weighted_loss: whether `loss_fn` returns a pair ``(sum, weight)`` in the place of the
            loss. The loss of a minibatch is then the sum of all sums over the sum of all weights,
            which is right for masked examples. The weight is not differentiated.
        remat: what the backward passes recompute: ``"none"``, ``"full"`` or a `jax.checkpoint`
            policy; for all stages, or a sequence with one for each.
        weight_rule: which version of the weights the passes read; that of the algorithm if not
            given.
        state_update: whether the mutable state changes with every ``"microbatch"``, in order, or
            once a ``"minibatch"``, by the mean of what its microbatches make of it (as GPipe
            keeps the moving averages of BatchNorm).
        run_ahead: how many steps may be outstanding: before the next one is dispatched, the loss
            of the oldest is waited for and checked. If not given, 8, and under asynchronous
            schedules as many more as there are stages. Each of them holds its batch.
        nonfinite: ``"raise"`` to stop with `NonFiniteLossError` when a loss is NaN or infinite,
            or ``"ignore"``.

    Raises:
        ValueError: if the arguments do not fit each other; the text says what to change.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        optimizer: optax.GradientTransformation,
        *,
        schedule: str | Schedule = "one_f_one_b",
        num_stages: int | None = None,
        num_microbatches: int | None = None,
        devices: Sequence[Any] | None = None,
        plan: Plan | Sequence[str] | None = None,
        eval_loss_fn: Callable[..., Any] | None = None,
        batch_axes: Any = 0,
        weighted_loss: bool = False,
        remat: Remat | Sequence[Remat] = "none",
        weight_rule: WeightRule | None = None,
        state_update: Literal["microbatch", "minibatch"] = "microbatch",
        run_ahead: int | None = None,
        nonfinite: Literal["raise", "ignore"] = "raise",
    ) -> None:
        placements = _choose_placements(schedule, num_stages, devices, plan)
        self._settings = Settings(
            loss_fn=loss_fn,
            optimizer=optimizer,
            schedule=schedule,
            weight_rule=weight_rule,
            placements=placements,
            num_microbatches=_choose_num_microbatches(schedule, num_microbatches),
            plan=plan,
            eval_loss_fn=eval_loss_fn or loss_fn,
            batch_axes=batch_axes,
            weighted_loss=weighted_loss,
            remat=_for_each_stage(remat, len(placements)),
            state_update=_one_of("state_update", state_update, ("microbatch", "minibatch")),
        )
        self._run_ahead = run_ahead
        self._raises = _one_of("nonfinite", nonfinite, ("raise", "ignore")) == "raise"
        self._prepared: Prepared | None = None
        self._broken: str | None = None
        self._timeline: Timeline | None = None
        if run_ahead is not None and run_ahead < 1:
            raise ValueError(f"run_ahead={run_ahead}; expected at least 1 step.")

    # -------- training

    def init(
        self, params: Any, batch: Any, *, model_state: Any = None, rng: Any = None
    ) -> PipelineState:
        """Traces, plans, compiles and places the model.

        Args:
            params: pytree of parameters. It is copied.
            batch: a minibatch, or its shapes; later ones must have the same structure, and may
                have other shapes.
            model_state: mutable collections such as BatchNorm statistics, if `loss_fn` takes
                them. They are copied.
            rng: the base random key, `jax.random.key(0)` if not given. Microbatch number k,
                counted from the first step on, gets ``jax.random.fold_in(rng, k)``, whatever the
                schedule and the number of stages.

        Raises:
            ValueError: if the loss function, its shapes, the plan, the schedule and the optimizer
                cannot work together; the text says why and what to change.
        """
        rng = jax.random.key(0) if rng is None else rng
        self._prepared = Prepared(self._settings, params, batch, model_state, rng)
        self._params_like = jax.tree.map(_Origin.of, params)
        self._model_state_like = jax.tree.map(_Origin.of, model_state)
        self._broken = None
        _log.info("%s, %s", self.plan, self.schedule.name)
        return PipelineState(self, self._prepared.start(params, model_state), 0, deque())

    def step(self, state: PipelineState, batch: Any) -> tuple[PipelineState, Metrics]:
        """Hands over one minibatch and returns without waiting for it.

        Args:
            state: what `init`, or the step before, returned. It cannot be used again.
            batch: pytree of arrays. They are copied.

        Returns:
            The new state, and the metrics of this minibatch: ``"loss"``, and those of `loss_fn`
            by their names (under ``"aux"`` if they are not a dict). Over the microbatches, real
            metrics are averaged, integers summed, and those with a batch axis concatenated.

        Raises:
            ValueError: if the batch has another structure than the one given to `init`, does not
                divide into microbatches, or `state` was used before.
            NonFiniteLossError: if the loss of an earlier step is NaN or infinite. `state` is
                still good then.
            BrokenPipelineError: if an earlier step failed on a device.
        """
        prepared = self._ready()
        self._run_of(state)
        self._check_losses(state)
        feed = prepared.feed(batch)
        run = self._take(state)
        with self._breaking_on_errors(state.step):
            loss, metrics = prepared.executor.step(run, feed)
        state._losses.append((state.step, loss))
        new_state = PipelineState(self, run, state.step + 1, state._losses)
        return new_state, _as_metrics(loss, metrics, feed.passes.split.traced.metrics_tree)

    def drain(self, state: PipelineState) -> PipelineState:
        """Finishes the minibatches in flight, so that all stages have seen the same ones.

        Under a synchronous schedule nothing ever is in flight between steps. Steps may follow;
        the pipeline then fills anew. `state` cannot be used again.
        """
        prepared = self._ready()
        self._run_of(state)
        self._check_losses(state)
        run = self._take(state)
        with self._breaking_on_errors(state.step):
            prepared.executor.drain(run)
        return PipelineState(self, run, state.step, state._losses)

    def evaluate(self, state: PipelineState, batch: Any) -> Metrics:
        """Computes the loss and the metrics of a batch of any size, forward only.

        It reads every stage's newest weights, and changes nothing.
        """
        return _as_metrics(*self._ready().evaluate(self._run_of(state), batch))

    # -------- what was learned

    def params(self, state: PipelineState) -> Any:
        """A copy of each stage's newest parameters, in the structure that `init` was given.

        Waits for them. Under an asynchronous schedule, `drain` first to have all stages at the
        same minibatch.
        """
        weights = self._ready().weights(self._run_of(state))
        with self._breaking_on_errors(state.step):
            return _gather(self._params_like, weights)

    def model_state(self, state: PipelineState) -> Any:
        """A copy of the mutable state, in the structure that `init` was given."""
        model = self._ready().model(self._run_of(state))
        with self._breaking_on_errors(state.step):
            return _gather(self._model_state_like, model)

    def stage_of_parameters(self) -> Any:
        """The number of the stage that holds each parameter, in the structure of the parameters.

        A parameter that several stages hold (tied weights) has a tuple of numbers.
        """
        homes = self._ready().split.homes
        leaves = [stages[0] if len(stages) == 1 else stages for stages in homes]
        return jax.tree.unflatten(jax.tree.structure(self._params_like), leaves)

    @property
    def plan(self) -> Plan:
        """Which layers make up which stage."""
        return self._ready().plan

    @property
    def schedule(self) -> Schedule:
        """What every worker does in a step: the very object that was validated and is run."""
        return self._ready().schedule

    def memory(self, state: PipelineState) -> tuple[StageMemory, ...]:
        """What each stage has held at its peak, counted since `init`."""
        prepared = self._ready()
        run = self._run_of(state)
        passes = run.passes or prepared.passes
        return tuple(
            StageMemory(
                stage=index,
                weight_bytes=_bytes(held.weights),
                peak_versions=held.peak_versions,
                optimizer_bytes=_bytes(held.optimizer),
                stash_bytes=runner.programs.saved_bytes,
                peak_in_flight=held.peak_in_flight,
            )
            for index, (held, runner) in enumerate(zip(run.stages, passes.stages, strict=True))
        )

    @contextmanager
    def record(self, state: PipelineState) -> Iterator[None]:
        """Measures when every program of the steps inside the ``with`` runs.

        `state` is that of the first of these steps; it is only looked at. Leaving the ``with``
        waits for all of them; `timeline` then tells. Recording costs a little time.
        """
        executor = self._ready().executor
        weights = [held.weights[0] for held in self._run_of(state).stages if held.weights]
        recorder = Recorder(executor.schedule, weights)
        executor.observer = recorder.observe
        try:
            yield
        finally:
            executor.observer = None
            self._timeline = recorder.finish()

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
        if self._run_ahead is not None:
            return self._run_ahead
        # Fewer cost time where steps are short: the thread sleeps for each loss, and wakes late.
        return 8 if self.schedule.flushes else 8 + self.schedule.num_stages

    def _ready(self) -> Prepared:
        if self._broken is not None:
            raise BrokenPipelineError(
                f"this Pipeline is broken: {self._broken}\nCall init again, with parameters from "
                "before the failure."
            )
        if self._prepared is None:
            raise ValueError("call Pipeline.init(params, batch) before anything else.")
        return self._prepared

    def _run_of(self, state: PipelineState) -> Run:
        if not isinstance(state, PipelineState):
            raise ValueError(f"expected the state that init or step returned; got {type(state)}.")
        if state._owner is not self:
            raise ValueError("this state belongs to another Pipeline.")
        return state.run

    def _take(self, state: PipelineState) -> Run:
        run = self._run_of(state)
        state._run = None
        return run

    def _check_losses(self, state: PipelineState) -> None:
        """Looks at the losses that are there; waits for some if too many are outstanding."""
        losses = state._losses
        while losses and (len(losses) >= self._allowed_ahead or losses[0][1].is_ready()):
            step, loss = losses[0]
            with self._breaking_on_errors(step):
                value = loss.item()
            losses.popleft()
            if self._raises and not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss of step {step} (counted from 0) is {value}. Lower the learning "
                    "rate or clip the gradients; look for a log or a division that can meet "
                    "zero; or pass nonfinite='ignore' to go on regardless."
                )

    @contextmanager
    def _breaking_on_errors(self, step: int) -> Iterator[None]:
        """Marks the pipeline as broken if what it holds may be half done or poisoned."""
        try:
            yield
        except BaseException as error:
            self._broken = f"step {step} failed with {type(error).__name__}: {error}"
            if not isinstance(error, Exception):
                raise
            raise BrokenPipelineError(self._broken) from error


@dataclass(frozen=True)
class StageMemory:
    """What one stage holds at its peak.

    Attributes:
        stage: the stage.
        weight_bytes: bytes of one version of its weights.
        peak_versions: the most versions alive at once.
        optimizer_bytes: bytes of its part of the optimizer state.
        stash_bytes: bytes that the stash keeps for one microbatch in flight.
        peak_in_flight: the most microbatches in flight at once.
    """

    stage: int
    weight_bytes: int
    peak_versions: int
    optimizer_bytes: int
    stash_bytes: int
    peak_in_flight: int

    @property
    def peak_bytes(self) -> int:
        """Bytes of all versions, the optimizer state and the stash."""
        weights = self.weight_bytes * self.peak_versions
        return weights + self.optimizer_bytes + self.stash_bytes * self.peak_in_flight


@dataclass(frozen=True)
class _Origin:
    """Where a leaf came from, and so where a copy of it goes."""

    sharding: Sharding | None

    @classmethod
    def of(cls, leaf: Any) -> _Origin:
        committed = isinstance(leaf, jax.Array) and leaf.committed
        return cls(leaf.sharding if committed else None)

    def bring_back(self, value: jax.Array) -> jax.Array:
        if is_key(value):
            return jax.device_put(value, self.sharding, may_alias=False)
        host = np.asarray(value)
        return jnp.array(host) if self.sharding is None else jax.device_put(host, self.sharding)


def _gather(origins: Any, values: Mapping[int, Any]) -> Any:
    leaves, tree = jax.tree.flatten(origins)
    return jax.tree.unflatten(tree, [leaf.bring_back(values[i]) for i, leaf in enumerate(leaves)])


def _as_metrics(loss: Any, leaves: Values, tree: Any) -> Metrics:
    if tree is None:
        return {"loss": loss}
    metrics = jax.tree.unflatten(tree, leaves)
    if not isinstance(metrics, Mapping):
        return {"loss": loss, "aux": metrics}
    return {"loss": loss, **metrics}


def _bytes(leaves: Values) -> int:
    return sum(leaf.nbytes for leaf in leaves)


# ---------------------------------------------------------------- reading the arguments


def _choose_placements(
    schedule: str | Schedule,
    num_stages: int | None,
    devices: Sequence[Any] | None,
    plan: Plan | Sequence[str] | None,
) -> tuple[Sharding, ...]:
    """One placement for each stage, the first of the devices."""
    wishes: dict[str, int | None] = {"num_stages": num_stages}
    if isinstance(schedule, Schedule):
        wishes["the schedule"] = schedule.num_stages
    else:
        find_algorithm(schedule)
    if plan is not None:
        wishes["the plan"] = plan.num_stages if isinstance(plan, Plan) else len(plan) + 1
    given = {name: count for name, count in wishes.items() if count is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"these disagree about the number of stages: {given}.")
    available = list(jax.devices() if devices is None else devices)
    count = next(iter(given.values()), len(available))
    if not 1 <= count <= len(available):
        raise ValueError(
            f"{count} stages need as many devices, but there are {len(available)}: {available}. "
            f"Use num_stages={len(available)} or fewer, or more devices; on a CPU call "
            f"jax.config.update('jax_num_cpu_devices', {count}) before JAX is first used."
        )
    return tuple(
        device if isinstance(device, Sharding) else SingleDeviceSharding(device)
        for device in available[:count]
    )


def _choose_num_microbatches(schedule: str | Schedule, wish: int | None) -> int | None:
    if wish is not None and wish < 1:
        raise ValueError(f"num_microbatches={wish}; expected at least 1.")
    if isinstance(schedule, Schedule):
        if wish not in (None, schedule.num_microbatches):
            raise ValueError(
                f"num_microbatches={wish}, but the schedule is for {schedule.num_microbatches}."
            )
        return schedule.num_microbatches
    return wish


def _for_each_stage(remat: Remat | Sequence[Remat], num_stages: int) -> tuple[Remat, ...]:
    each: tuple[Any, ...] = (remat,) * num_stages
    if not isinstance(remat, str) and not callable(remat):
        each = tuple(remat)
    if len(each) != num_stages:
        raise ValueError(f"remat has {len(each)} entries for {num_stages} stages.")
    for how in each:
        if not callable(how):
            _one_of("remat", how, ("none", "full"))
    return each


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, allowed))}.")
    return value
