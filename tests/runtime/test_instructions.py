"""The instructions that schedules become, as text.

The listings are files in ``tests/runtime/listings``; ``python tests/runtime/test_instructions.py``
writes them again. Nothing is compiled here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from pdjax.communication.all_reduce import find_reduce
from pdjax.communication.ring import Replicas, RingReduce
from pdjax.communication.transport import LocalTransport
from pdjax.runtime.instructions import Free, RunPass, Send, UpdateWeights
from pdjax.runtime.microbatches import Slicing
from pdjax.runtime.programs import Passes
from pdjax.runtime.replica_map import ReplicaMap
from pdjax.runtime.update import UpdateRunner
from pdjax.schedules import ALGORITHMS, Schedule, one_f_one_b, pipedream
from pdjax.schedules.weight_rule import LATEST, STASH, WeightRule
from pdjax.split.differentiate import Remat
from pdjax.split.optimizer import split_update
from pdjax.split.stages import split
from pdjax.trace.layers import build_graph

LISTINGS = Path(__file__).with_name("listings")
WIDTH, ROWS = 4, 2


def loss_fn(params, batch, rng):
    """A layer for each parameter; the first one's output skips to the last."""
    del rng
    x = skipped = jnp.tanh(batch["x"] @ params[0])
    for weight in params[1:]:
        x = jnp.tanh(x @ weight)
    return jnp.mean((x + skipped - batch["y"]) ** 2)


def straight_loss(params, batch, rng):
    """Under an asynchronous schedule: no value skips a stage."""
    del rng
    x = batch["x"]
    for weight in params:
        x = jnp.tanh(x @ weight)
    return jnp.mean((x - batch["y"]) ** 2)


def weighted_loss(params, batch, rng):
    total = straight_loss(params, batch, rng)
    return total, jnp.sum(batch["y"])


def passes_of(
    schedule: Schedule,
    rule: WeightRule,
    loss: Any = loss_fn,
    *,
    optimizer: Any = optax.sgd(0.1),  # noqa: B008  # a pair of functions
    weighted: bool = False,
    is_local: tuple[bool, ...] = (),
) -> Passes:
    """The passes of a model with one layer for each stage, never compiled."""
    params = [jnp.ones((WIDTH, WIDTH))] * schedule.num_stages
    batch = {name: jnp.ones((ROWS, WIDTH)) for name in "xy"}
    graph = build_graph(loss, params, batch, jax.random.key(0), weighted_loss=weighted)
    stages = split(graph, range(schedule.num_stages))
    replicas = ReplicaMap.of(schedule)
    device = SingleDeviceSharding(jax.devices()[0])
    names = stages.traced.param_names
    update = split_update(optimizer, params, stages.homes, names, schedule.num_stages)
    divisor = jax.ShapeDtypeStruct((), jnp.float32)
    updates = [
        UpdateRunner(update, stage, device, donate_weights=rule == LATEST, divisor=divisor)
        for stage in replicas.stage_of
    ]
    transport: Any = LocalTransport(len(replicas))
    transport.is_local = is_local or transport.is_local
    reduces = {}
    for stage, count in enumerate(replicas.num_replicas):
        at = replicas.of_stage(stage)
        if count > 1 and any(transport.is_local[replica] for replica in at):
            shapes = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)]
            found = find_reduce(Replicas(at, [device] * count, transport), shapes)
            reduces[stage] = found, None
    remat: list[Remat] = ["none"] * schedule.num_stages
    return Passes(
        stages,
        [device] * len(replicas),
        schedule,
        rule,
        Slicing(schedule.num_microbatches, (0, 0)),
        remat,
        updates,
        (),
        ((),) * len(replicas),
        transport.is_local,
        reduces=reduces,
    )


def named(name: str, num_workers: int, num_microbatches: int) -> Passes:
    algorithm = ALGORITHMS[name]
    count = num_microbatches if algorithm.divides else 1
    schedule = algorithm.make(num_workers * algorithm.num_chunks, count)
    loss = straight_loss if algorithm.stale else loss_fn
    return passes_of(schedule, algorithm.weight_rule, loss)


CASES: dict[str, Any] = {
    **{name: lambda name=name: named(name, 2, 2) for name in ALGORITHMS},
    "one_f_one_b-3x4": lambda: named("one_f_one_b", 3, 4),
    "one_f_one_b-replicas": lambda: passes_of(one_f_one_b(2, 4, replicas=(2, 1)), LATEST),
    "pipedream-replicas": lambda: passes_of(pipedream(2, replicas=(2, 1)), STASH, straight_loss),
    "one_f_one_b-process-0-of-2": lambda: passes_of(
        one_f_one_b(2, 2), LATEST, is_local=(True, False)
    ),
    "one_f_one_b-replicas-process-1-of-2": lambda: passes_of(
        one_f_one_b(2, 2, replicas=(2, 1)), LATEST, is_local=(False, True, True)
    ),
    "one_f_one_b-clipped-weighted": lambda: passes_of(
        one_f_one_b(2, 2),
        LATEST,
        weighted_loss,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        weighted=True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_listings_are_as_they_were(name):
    assert f"{CASES[name]().listing}\n" == (LISTINGS / f"{name}.txt").read_text()


def messages(passes: Passes, source: int, target: int) -> list[tuple[Any, ...]]:
    """What goes from one replica to another, in order."""
    return [
        (op.content, op.microbatch, op.num_bytes, op.shapes)
        for op in passes.listing
        if isinstance(op, Send) and (op.source, op.target) == (source, target)
    ]


@pytest.mark.parametrize("schedule", [one_f_one_b(3, 4), one_f_one_b(2, 4, replicas=(2, 1))])
def test_both_ends_send_and_receive_in_one_order(schedule):
    """Every replica in a process of its own: no call is one-sided, or out of its turn."""
    count = len(ReplicaMap.of(schedule))
    each = [
        passes_of(schedule, LATEST, is_local=tuple(at == own for at in range(count)))
        for own in range(count)
    ]
    whole = passes_of(schedule, LATEST)
    for source in range(count):
        for target in range(count):
            expected = messages(whole, source, target)
            for own in {source, target}:
                assert messages(each[own], source, target) == expected


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_stash_is_empty_after_a_cycle(name):
    passes = named(name, 2, 4)
    for replica in range(len(passes.replicas)):
        runs = [op for op in passes.listing if isinstance(op, RunPass) and op.replica == replica]
        assert sum(op.stash_bytes for op in runs) == 0
        assert any(op.begins for op in runs)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_versions_are_let_go_where_they_are_stashed(name):
    stale = ALGORITHMS[name].stale
    listing = named(name, 2, 2).listing
    assert any(isinstance(op, Free) for op in listing) == stale
    updates = [op for op in listing if isinstance(op, UpdateWeights)]
    assert all(op.frees == stale for op in updates)


def test_a_ring_is_waited_for_by_a_thread_of_its_own():
    passes = CASES["one_f_one_b-replicas-process-1-of-2"]()
    (blocks,) = passes.listing.phases
    waiting = [{op.op for op in block.instructions} for block in blocks if block.waits]
    assert waiting == [{"REDUCE", "UPDATE"}] or waiting == [{"REDUCE"}, {"UPDATE"}]
    assert isinstance(passes._reduces[0][0], RingReduce)


if __name__ == "__main__":
    for case, make in CASES.items():
        LISTINGS.mkdir(exist_ok=True)
        (LISTINGS / f"{case}.txt").write_text(f"{make().listing}\n")
