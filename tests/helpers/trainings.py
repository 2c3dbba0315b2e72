"""Trainings that must come out the same in one process as in several."""

from __future__ import annotations

import functools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import zoo

import pdjax
from pdjax import schedules
from pdjax.runtime import init_state
from pdjax.schedules import Schedule
from pdjax.schedules.weight_rule import VERTICAL_SYNC

ADAM = optax.adam(1e-2, eps=1e-3)
CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), ADAM)

Found = dict[str, np.ndarray]


@dataclass(frozen=True)
class Training:
    """What is trained, on the first devices of all processes.

    Attributes:
        schedule: the schedule; its workers are the devices in order.
        case: makes the model.
        optimizer: the optimizer.
        sizes: examples in a microbatch, for one minibatch after the other.
        drains: minibatches before which the pipeline is drained.
        options: of the `Pipeline`.
        order: which of all devices the workers are on; the first ones if not given.
        slow: the process that sends and receives with random delays.
        evaluated_in: numbers of microbatches in which it is evaluated.
        exact: whether the order of all sums is that of one process, so that every bit is the same.
    """

    schedule: Schedule
    case: Callable[[], zoo.Case]
    optimizer: optax.GradientTransformation = ADAM
    sizes: Sequence[int] = (2, 2, 2)
    drains: Sequence[int] = ()
    options: dict[str, Any] = field(default_factory=dict)
    order: tuple[int, ...] | None = None
    slow: int | None = None
    evaluated_in: Sequence[int] = ()
    exact: bool = True

    def batches(self, case: zoo.Case) -> list[Any]:
        """The minibatches."""
        count = self.schedule.num_microbatches
        return [case.make_batch(size * count, seed) for seed, size in enumerate(self.sizes)]

    def devices(self) -> list[Any] | None:
        """The devices of the workers; None to leave the choice to the pipeline."""
        return None if self.order is None else [jax.devices()[at] for at in self.order]


def run(training: Training) -> Found:
    """Trains; returns all that can be seen of it.

    What begins with "own/" is what this process did itself.
    """
    case = training.case()
    batches = training.batches(case)
    pipe = pdjax.Pipeline(
        case.loss_fn,
        training.optimizer,
        schedule=training.schedule,
        plan="balanced",
        devices=training.devices(),
        **training.options,
    )
    key = jax.random.key(5, impl="unsafe_rbg")
    state = pipe.init(case.params, batches[0], model_state=case.model_state, rng=key)
    if training.slow == jax.process_index():
        _slow_down(state.executor)
    reads, sizes = pipe.reads(), list(training.sizes)
    found: Found = {}
    compiled: list[list[str]] = []
    with pipe.record(state):
        for index, batch in enumerate(batches):
            if index in training.drains:
                state = pipe.drain(state)
            with compilations() as names:
                state, metrics = pipe.step(state, jax.tree.map(_shape_unless, reads, batch))
            compiled.append(names)
            found |= _named(f"step {index}", metrics)
    for count in training.evaluated_in:
        metrics = pipe.evaluate(state, case.make_batch(2 * count, 99), num_microbatches=count)
        found |= _named(f"evaluated in {count}", metrics)
    found |= _named("undrained", pipe.params(state))  # the steps that follow reuse their memory
    for batch in batches[:2]:
        state, metrics = pipe.step(state, batch)
    found |= _named("last step", metrics)
    state = pipe.drain(state)
    found |= _named("params", pipe.params(state))
    found |= _named("state", pipe.model_state(state))
    spans = [(s.worker, ord(s.kind[0]), s.stage, s.microbatch) for s in pipe.timeline().spans]
    found["spans"] = np.asarray(sorted(spans))
    found |= _named("own", _counts(pipe, state))
    # Replicas get their first minibatch one after the other, and then a copy is compiled for each.
    cycle = training.schedule.num_minibatches
    again = [at for at, size in enumerate(sizes) if sizes[:at].count(size) >= cycle]
    found["compiled first"] = np.asarray(len(compiled[0]))
    found["compiled again"] = np.asarray(sum(len(compiled[at]) for at in again))
    return found


def run_made(given: Literal["functions", "arrays"]) -> Found:
    """Trains a model on two workers whose parameters and state are made by functions, or arrays.

    Of every stage of this process come the bytes of its weights, which its optimizer state has,
    too ("own/weights"), and the most that its device held and made at once in `init`.
    """
    model, case = _Wide(), zoo.dense_blocks(width=_Wide.width)
    x, y = case.make_batch(4, 0).values()

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        variables = {"params": params, "batch_stats": state}
        y, new = model.apply(variables, batch["x"], mutable=["batch_stats"])
        return jnp.mean((y - batch["y"]) ** 2), new["batch_stats"]

    def make(kind: str) -> Callable[[], Any]:
        return lambda: model.init(jax.random.key(3), x)[kind]

    params, state = make("params"), make("batch_stats")
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(params))]
    if given == "arrays":
        params, state = jax.jit(params)(), jax.jit(state)()
    optimizer = optax.sgd(0.1, momentum=0.9)
    pipe = pdjax.Pipeline(loss_fn, optimizer, plan="balanced", num_stages=2, num_microbatches=2)
    batch = {"x": x, "y": y}
    with _watched() as (held, made):
        state = pipe.init(params, batch, model_state=state)
    found: Found = {}
    stages = jax.tree.leaves(pipe.stage_of_parameters())
    for stage, mine in enumerate(held.lasting for held in state.run.stages):
        if mine.weights:
            own = sum(size for at, size in zip(stages, sizes, strict=True) if at == stage)
            found[f"own/weights {stage}"] = np.asarray(own)
            found[f"own/held {stage}"] = np.asarray(held[mine.weights[0].device])
            found[f"own/made {stage}"] = np.asarray(made[mine.weights[0].device])
    found |= _named("initial", (pipe.params(state), pipe.model_state(state)))
    for _ in range(3):
        state, metrics = pipe.step(state, batch)
    found |= _named("trained", (metrics, pipe.params(state), pipe.model_state(state)))
    return found


class _Wide(nn.Module):
    """Layers that are large beside all else."""

    width = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = nn.tanh(nn.BatchNorm(use_running_average=False)(nn.Dense(self.width)(x)))
        return x


@contextmanager
def _watched() -> Iterator[tuple[Counter[Any], Counter[Any]]]:
    """The most bytes that each device holds inside the ``with``, and gets at once when it starts.

    What it held before does not count.
    """
    before, held, made, run = _live_bytes(), Counter[Any](), Counter[Any](), init_state._run

    def look() -> None:
        for device, size in (_live_bytes() - before).items():
            held[device] = max(held[device], size)

    def watched(*arguments: Any) -> Any:
        values = run(*arguments)
        for device in {value.device for value in values}:
            made[device] = max(made[device], sum(value.nbytes for value in values))
        look()
        return values

    init_state._run = watched
    yield held, made
    init_state._run = run
    look()


def _live_bytes() -> Counter[Any]:
    live = Counter[Any]()
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            live[shard.device] += shard.data.nbytes
    return live


def _shape_unless(is_read: bool, leaf: Any) -> Any:
    return leaf if is_read else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _named(name: str, tree: Any) -> Found:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{name}{jax.tree_util.keystr(path)}": _host(leaf) for path, leaf in paths}


def _host(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _counts(pipe: pdjax.Pipeline, state: pdjax.PipelineState) -> dict[str, Any]:
    """What this process counted: numbers of which all processes together have the sum."""
    counts = pipe.counts(state)
    actions = [[done.get(kind, 0) for kind in "FBIWU"] for done in counts.actions]
    workers = range(len(counts.peak_bytes))
    links = [[counts.link_bytes.get((a, b), 0) for b in workers] for a in workers]
    return {"actions": np.asarray(actions), "links": np.asarray(links), "peaks": counts.peak_bytes}


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Notes the programs that XLA is asked to compile."""
    noted: list[str] = []
    active = True

    def listen(event: str, **_: object) -> None:
        if active and event.endswith("compile_requests_use_cache"):
            noted.append(event)

    jax.monitoring.register_event_listener(listen)
    yield noted
    active = False


def _slow_down(executor: Any) -> None:
    """Makes a transport wait now and then, as a slow link does."""
    chance = random.Random(0)
    move = executor.transport.send_recv

    def slow(values: Any, shapes: Any, source: int, target: int) -> Any:
        if chance.random() < 0.3:
            jax.block_until_ready(values)
            time.sleep(chance.random() / 100)
        return move(values, shapes, source, target)

    executor.transport.send_recv = slow


# ---------------------------------------------------------------- models


@functools.cache
def dense() -> zoo.Case:
    """Residual blocks with dropout; `runtime/test_replicas.py` compares them with the oracle."""
    return zoo.dense_blocks(num_blocks=4, dropout=0.2).double()


def _knotted(tied: bool) -> zoo.Case:
    """A model with all that makes cuts hard.

    Integers, booleans and keys cross cuts, a value is used by several later stages, an array is
    closed over, there is mutable state on two stages, a loss with weights, and metrics that are
    averaged, summed and concatenated.
    """
    table = np.random.default_rng(5).normal(size=(4, 4))

    def loss_fn(params: Any, state: Any, batch: Any, rng: Any) -> Any:
        x = first = jnp.tanh(batch["x"] @ params["w0"])
        early = {"mean": 0.9 * state["early"]["mean"] + 0.1 * x.mean(0)}
        best, positive = jnp.argmax(x, -1), x > 0
        key = jax.random.fold_in(rng, best[0])
        x = jnp.tanh((x - state["early"]["mean"]) @ params["w1"]) + jnp.asarray(table)[1]
        x = jnp.where(positive, x, -x) + jax.nn.one_hot(best, 4, dtype=x.dtype)
        x = jnp.tanh(x @ params["w2"]) + jax.random.normal(key, x.shape, x.dtype)
        y = (x + first) @ params["w0" if tied else "w3"]
        late = {"square": 0.9 * state["late"]["square"] + 0.1 * jnp.mean(y**2, 0)}
        late["count"] = state["late"]["count"] + 1
        error = batch["mask"] * ((y - batch["y"]) ** 2).sum(-1)
        metrics = {"best": best, "positive": positive.sum(), "mean": y.mean(0), "constant": 3.0}
        metrics["drawn"] = key
        return (error.sum(), batch["mask"].sum()), ({"early": early, "late": late}, metrics)

    def make_batch(size: int, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        batch = {name: rng.normal(size=(size, 4)) for name in "xy"}
        return {**batch, "mask": (rng.random(size) < 0.7) + 0.1}

    rng = np.random.default_rng(0)
    params = {f"w{i}": rng.normal(size=(4, 4)) / 2 for i in range(3 if tied else 4)}
    state = {
        "early": {"mean": np.zeros(4)},
        "late": {"square": np.zeros(4), "count": np.zeros((), np.int32)},
    }
    return zoo.Case(loss_fn, params, state, make_batch)


knotted = functools.cache(functools.partial(_knotted, tied=False))
tied = functools.cache(functools.partial(_knotted, tied=True))


class _Normed(nn.Module):
    """Dense layers with BatchNorm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = nn.Dense(4, param_dtype=jnp.float64)(x)
            x = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(x)
            x = nn.tanh(x)
        return x


@functools.cache
def normed() -> zoo.Case:
    """Dense layers with BatchNorm."""
    model = _Normed()

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        variables = {"params": params, "batch_stats": state}
        y, new = model.apply(variables, batch["x"], mutable=["batch_stats"])
        return jnp.mean((y - batch["y"]) ** 2), new["batch_stats"]

    make_batch = zoo.dense_blocks().double().make_batch
    variables = jax.jit(model.init)(jax.random.key(0), make_batch(2, 0)["x"])
    return zoo.Case(loss_fn, variables["params"], variables["batch_stats"], make_batch).double()


WEIGHTED = {"weighted_loss": True}

# ---------------------------------------------------------------- trainings


def _of(**trainings: Training) -> dict[str, Training]:
    return trainings


TWO = _of(
    pipedream=Training(
        schedules.pipedream(2), dense, sizes=(2,) * 7, drains=(4,), evaluated_in=(2,), slow=0
    ),
    vertical_sync=Training(
        schedules.pipedream(2), dense, sizes=(2,) * 5, options={"weight_rule": VERTICAL_SYNC}
    ),
    one_stage=Training(
        schedules.one_f_one_b(1, 2), dense, CLIPPED, sizes=(2, 2), evaluated_in=(2,)
    ),
    double_buffer=Training(schedules.pipedream_2bw(2, 2), dense, sizes=(2,) * 5, drains=(3,)),
    one_f_one_b=Training(
        schedules.one_f_one_b(2, 3),
        tied,
        CLIPPED,
        sizes=(2, 4, 2),
        options=WEIGHTED,
        evaluated_in=(1, 3),
    ),
    gpipe=Training(schedules.gpipe(2, 2), normed, options={"state_update": "minibatch"}),
    interleaved=Training(schedules.interleaved(4, 2), dense, sizes=(2, 2)),
    zero_bubble_h1=Training(schedules.zero_bubble_h1(2, 3), normed, sizes=(2, 2)),
    zero_bubble_v=Training(schedules.zero_bubble_v(4, 3), dense, CLIPPED, sizes=(2, 2)),
)
"""On two workers, or one."""

FOUR = _of(
    pipedream=Training(
        schedules.pipedream(4),
        knotted,
        sizes=(2, 2, 4, 2, 4, 4, 2),
        options={**WEIGHTED, "eval_loss_fn": lambda *given: tied().loss_fn(*given)},
        evaluated_in=(2,),
        slow=2,
    ),
    replicas=Training(
        schedules.pipedream(2, replicas=(2, 2), update_lag=1),
        dense,
        sizes=(2,) * 13,
        drains=(5, 7),
        slow=1,
    ),
    three_workers=Training(schedules.one_f_one_b(2, 3, replicas=(1, 2)), dense, CLIPPED),
    three_replicas=Training(
        schedules.pipedream(2, replicas=(3, 1)), dense, sizes=(2,) * 7, exact=False
    ),
)
"""On four workers, or three of them."""

MIXED = _of(
    pipedream=Training(
        schedules.pipedream(2, replicas=(2, 2)),
        dense,
        sizes=(2,) * 9,
        drains=(5,),
        order=(0, 2, 3, 1),
        slow=1,
    ),
    one_f_one_b=Training(
        schedules.one_f_one_b(2, 3, replicas=(2, 2)),
        tied,
        CLIPPED,
        options=WEIGHTED,
        order=(0, 2, 3, 1),
        evaluated_in=(2,),
    ),
    replicas_amid=Training(
        schedules.pipedream(3, replicas=(1, 2, 1)), dense, sizes=(2,) * 5, order=(2, 1, 3, 0)
    ),
    zero_bubble_v=Training(  # processes come to what all are told in different turns
        schedules.zero_bubble_v(4, 3), knotted, CLIPPED, (2, 2), options=WEIGHTED, order=(0, 2)
    ),
    weighted=Training(  # between one and another process's updates a cotangent crosses
        schedules.one_f_one_b(4, 3), knotted, sizes=(2, 2), options=WEIGHTED, order=(0, 2, 1, 3)
    ),
    first_replicated=Training(
        schedules.pipedream(2, replicas=(2, 1)), dense, sizes=(2,) * 5, order=(1, 3, 0)
    ),
)
"""On four workers that are two devices in each of two processes."""


@dataclass(frozen=True)
class Group:
    """Trainings that run one after the other in the same processes."""

    num_processes: int
    num_devices: int
    trainings: dict[str, Training]


GROUPS = {"two": Group(2, 1, TWO), "four": Group(4, 1, FOUR), "mixed": Group(2, 2, MIXED)}
"""By name; each process has `num_devices`."""
