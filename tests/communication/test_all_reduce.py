"""Sums over the replicas of a stage, array by array."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import zoo
from jax.sharding import SingleDeviceSharding

import pdjax
from pdjax import schedules
from pdjax.communication.all_reduce import AllReduce, MeanOfState, SumOnEach, find_reduce
from pdjax.communication.ring import Replicas, RingReduce
from pdjax.communication.transport import LocalTransport
from pdjax.pipeline import prepared

KEY = jax.random.key(0)
SHAPES = {"scalar": (), "vector": (3,), "another scalar": (), "none": (0, 2), "matrix": (2, 3)}


def parts_on(count: int):
    """For each replica its place, and arrays of all these shapes there."""
    places = [SingleDeviceSharding(device) for device in jax.devices()[:count]]
    rng = np.random.default_rng(0)
    parts = [
        tuple(jax.device_put(rng.normal(size=s).astype(np.float32), p) for s in SHAPES.values())
        for p in places
    ]
    return places, parts


def shapes_of(arrays):
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]


def here(placements) -> Replicas:
    """Replicas of this process."""
    places = range(len(placements))
    return Replicas(places, placements, LocalTransport(len(places)))


def ring(placements, shapes, *, mean=False):
    return RingReduce(here(placements), shapes, mean=mean)


KINDS = pytest.mark.parametrize("kind", [AllReduce, SumOnEach, ring])


@KINDS
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("mean", [False, True])
def test_each_replica_gets_the_sum_in_the_shapes_that_it_gave(kind, count, mean):
    places, parts = parts_on(count)
    got = kind(places, shapes_of(parts[0]), mean=mean)(parts)
    combine = np.mean if mean else np.sum
    expected = tuple(combine(jax.device_get(column), axis=0) for column in zip(*parts, strict=True))
    for place, sums in zip(places, got, strict=True):
        assert sums is not None
        chex.assert_trees_all_equal_shapes_and_dtypes(sums, parts[0])
        chex.assert_trees_all_close(jax.device_get(sums), expected, rtol=1e-6)
        assert all(array.devices() == place.device_set for array in sums)


@KINDS
def test_a_replica_without_gradients_adds_nothing(kind):
    places, parts = parts_on(2)
    got = kind(places, shapes_of(parts[0]))([parts[0], None])
    for sums in got:
        chex.assert_trees_all_equal(jax.device_get(sums), jax.device_get(parts[0]))


@KINDS
def test_what_is_given_is_left_alone(kind):
    places, parts = parts_on(2)
    before = jax.device_get(parts)
    reduce = kind(places, shapes_of(parts[0]))
    reduce(reduce(parts))
    chex.assert_trees_all_equal(jax.device_get(parts), before)


@pytest.mark.parametrize("mean", [False, True])
def test_both_kinds_sum_in_the_same_order(mean):
    places, parts = parts_on(4)
    one, other = (kind(places, shapes_of(parts[0]), mean=mean) for kind in (AllReduce, SumOnEach))
    chex.assert_trees_all_equal(*(jax.device_get(reduce(parts)) for reduce in (one, other)))
    assert one.sent_bytes == other.sent_bytes == 66  # 3 / 2 of the bytes of 11 numbers


def test_arrays_of_several_types_go_around_together():
    places, parts = parts_on(3)
    halves = [tuple(x.astype(jnp.float16) for x in part) for part in parts]
    mixed = [(*half, *part, *half) for half, part in zip(halves, parts, strict=True)]
    got = ring(places, shapes_of(mixed[0]))(mixed)
    for sums in got:
        assert sums is not None
        chex.assert_trees_all_equal_shapes_and_dtypes(sums, mixed[0])
        for at, column in enumerate(zip(*mixed, strict=True)):
            expected = sum(np.asarray(x, np.float32) for x in column)
            np.testing.assert_allclose(np.asarray(sums[at], np.float32), expected, atol=5e-3)


class Counting(LocalTransport):
    """Notes the bytes of each array that is sent, call by call."""

    def __init__(self, num_places: int) -> None:
        super().__init__(num_places)
        self.sent: list[list[int]] = []

    def send_recv(self, values, shapes, source, target):
        self.sent.append([value.nbytes for value in values or ()])
        return super().send_recv(values, shapes, source, target)


def sent_by_ring(count: int, shapes) -> list[list[int]]:
    """The bytes of each array that `count` replicas send, call by call."""
    places, transport = parts_on(count)[0], Counting(count)
    reduce = RingReduce(Replicas(range(count), places, transport), shapes)
    reduce([tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)] * count)
    return transport.sent


def test_all_send_as_many_bytes_whatever_the_types():
    shapes = [jax.ShapeDtypeStruct((30,), dtype) for dtype in (jnp.bfloat16, jnp.float32)]
    sent = sent_by_ring(3, shapes)
    assert [sum(call) for call in sent] == [60] * 12  # a third of 180, in four turns


def test_small_arrays_travel_together_and_large_ones_by_themselves():
    """Each array that travels has a price, and to lay large ones side by side, too."""
    sizes = [4, 100_000, 8, 12, 100_000, 16]
    shapes = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes]
    assert sent_by_ring(2, shapes) == [[400_000, 80]] * 4  # a half with one large one, in two turns


def test_arrays_may_be_cut_before_others_are_summed_up():
    places, parts = parts_on(3)
    _, others = parts_on(3)
    reduce = ring(places, shapes_of(parts[0]))
    begun = [reduce.begin(at, part) for at, part in enumerate(parts)]
    reduce([None, others[1], None])
    some = [begun[0], parts[1], begun[2]]
    for sums in (reduce(begun), reduce(some)):
        chex.assert_trees_all_equal(jax.device_get(sums), jax.device_get(reduce(parts)))


def test_nothing_to_sum():
    places, _ = parts_on(2)
    nothing = jax.ShapeDtypeStruct((0, 2), jnp.float32)
    for shapes in ([], [nothing]):
        assert [len(sums or ()) for sums in ring(places, shapes)([None, None])] == [len(shapes)] * 2


def test_no_thread_waits_for_another_in_a_process_with_cpu_devices():
    """XLA would end the process if one came 40 s late."""
    places, parts = parts_on(3)
    reduce = find_reduce(here(places), shapes_of(parts[0]))
    assert not any("all_reduce" in lower().as_text() for lower in reduce.lowerings())
    collective = AllReduce(places, shapes_of(parts[0]))
    assert any("all_reduce" in lower().as_text() for lower in collective.lowerings())


def test_arrays_are_cut_when_they_are_complete_in_whatever_order_they_come(monkeypatch):
    """As between processes, and with backward passes that do not run in order of microbatches."""
    monkeypatch.setattr(prepared, "find_reduce", RingReduce)
    grid = "worker 0: 0F0 0F2 0F4 0B4 0B0 0B2 0U5\nworker 1: 0F1 0F3 0F5 0B3 0B5 0B1 0U5"
    schedule = schedules.Schedule.parse(f"mine: 1 stages, 6 microbatches\n{grid}")
    case = zoo.dense_blocks(num_blocks=2)
    pipe = pdjax.Pipeline(case.loss_fn, optax.adam(0.1), schedule=schedule)
    batches = [case.make_batch(12, seed) for seed in range(4)]
    state = pipe.init(case.params, batches[0], rng=KEY)
    for batch in batches:
        state, _ = pipe.step(state, batch)
    expected, _, _ = oracle.replay_synchronous(
        case.loss_fn, optax.adam(0.1), case.params, batches, 6, KEY
    )
    chex.assert_trees_all_close(pipe.params(state), expected, rtol=1e-5, atol=1e-6)


def test_scalar_parameters_of_a_replicated_stage():
    def loss_fn(params, batch):
        hidden = jnp.tanh(params["scale"] * batch["x"] @ params["a"] + params["shift"])
        return jnp.mean((hidden @ params["b"]) ** 2)

    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(3, 3)).astype(np.float32) for name in "ab"}
    params |= {"scale": np.float32(0.7), "shift": np.float32(0.1)}
    batch = {"x": rng.normal(size=(8, 3)).astype(np.float32)}
    optimizer = optax.adam(0.1)
    pipe = pdjax.Pipeline(loss_fn, optimizer, schedule=schedules.one_f_one_b(2, 4, replicas=(2, 2)))
    state = pipe.init(params, batch)
    for _ in range(3):
        state, _ = pipe.step(state, batch)
    expected, _, _ = oracle.replay_synchronous(
        lambda p, batch, rng: loss_fn(p, batch), optimizer, params, [batch] * 3, 4, KEY
    )
    chex.assert_trees_all_close(pipe.params(state), expected, rtol=1e-5, atol=1e-6)


def state_on(place, **leaves):
    return {at: jax.device_put(leaf, place) for at, leaf in enumerate(leaves.values())}


def test_mutable_state_that_has_no_mean_is_left_as_it_is(compilations):
    """Counters: there is nothing to average, and nothing to compile or to wait for."""
    places, _ = parts_on(2)
    states = [state_on(place, count=np.int32(3 + at)) for at, place in enumerate(places)]
    shapes = {0: jax.ShapeDtypeStruct((), jnp.int32)}
    before = [dict(state) for state in states]
    compilations.clear()
    mean = MeanOfState(here(places), shapes)
    mean(states)
    assert states == before
    assert list(mean.lowerings()) == []
    assert compilations == []


def test_scalars_of_the_mutable_state_are_averaged_and_counters_kept():
    places, _ = parts_on(2)
    states = [
        state_on(place, mean=np.float32(1 + 2 * at), count=np.int32(3), row=np.full(2, at * 1.0))
        for at, place in enumerate(places)
    ]
    shapes = {at: jax.ShapeDtypeStruct(x.shape, x.dtype) for at, x in states[0].items()}
    MeanOfState(here(places), shapes)(states)
    for state in states:
        expected = {0: np.float32(2), 1: np.int32(3), 2: np.full(2, 0.5, np.float32)}
        chex.assert_trees_all_equal(jax.device_get(state), expected)
        assert state[0].shape == ()
