"""The simulator and the executor do the same: action for action, byte for byte."""

from __future__ import annotations

import functools
from collections import Counter
from itertools import pairwise

import jax.numpy as jnp
import optax
import pytest
import zoo

import pdjax
from pdjax.communication.transport import LocalTransport
from pdjax.profile.profile import LayerProfile, Profile
from pdjax.schedules import ALGORITHMS
from pdjax.simulate import peak_bytes

SIZES = [(1, 2), (2, 3), (4, 5)]
STEPS = 9  # so that the versions of four stages are all there


@functools.cache
def case(stale: bool = False) -> zoo.Case:
    """A model; unless weights may be stale, with a skip connection from the first stage."""
    return zoo.dense_blocks(num_blocks=8, skip=not stale)


def flat_profile(plan: pdjax.Plan) -> Profile:
    return Profile(tuple(LayerProfile(name, 1.0, 2.0, 0.0, 0.0) for name in plan.layers))


def run(name, num_workers, num_microbatches, **options):
    """Trains a few steps and drains; returns the pipeline, its state, and what was dispatched."""
    algorithm = ALGORITHMS[name]
    m = num_microbatches if algorithm.divides else 1
    m = max(m, num_workers) if name == "pipedream_2bw" else m
    pipe = pdjax.Pipeline(
        case(algorithm.stale).loss_fn,
        optax.adam(1e-3),
        schedule=name,
        num_stages=num_workers * algorithm.num_chunks,
        num_microbatches=m,
        **options,
    )
    batch = case().make_batch(m * zoo.MICROBATCH, 0)
    state = pipe.init(case().params, batch)
    seen = [[] for _ in pipe.schedule.workers]

    def observe(kind, stage, microbatch, made):
        del made
        worker = seen[pipe.schedule.worker_of(stage)]
        worker += [pdjax.Action(each, stage, microbatch) for each in kind]

    state.executor.observer = observe
    for _ in range(STEPS):
        state, _ = pipe.step(state, batch)
    state = pipe.drain(state)
    return pipe, state, seen


@pytest.mark.grid(1)
@pytest.mark.parametrize(("num_workers", "num_microbatches"), SIZES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_done_is_what_was_planned_and_simulated(name, num_workers, num_microbatches):
    pipe, state, seen = run(name, num_workers, num_microbatches)
    planned = pipe.schedule.unroll(STEPS)
    assert tuple(map(tuple, seen)) == planned
    timeline = pipe.simulate(flat_profile(pipe.plan), num_minibatches=STEPS)
    for worker, actions in enumerate(planned):
        spans = [(s.kind, s.stage, s.microbatch) for s in timeline.spans_of(worker)]
        assert spans == list(map(tuple, actions))
    counts = pipe.counts(state)
    assert counts.link_bytes == timeline.link_bytes
    costs = state.training.prepared.stage_costs(flat_profile(pipe.plan))
    for stage, actions in enumerate(counts.actions):
        expected = [a.kind for worker in planned for a in worker if a.stage == stage]
        assert actions == {kind: expected.count(kind) for kind in sorted(set(expected))}
    rule = ALGORITHMS[name].weight_rule
    assert counts.peak_bytes == peak_bytes(pipe.schedule, costs, rule)
    for worker, peak in enumerate(counts.peak_bytes):
        stages = pipe.schedule.stages_of(worker)
        fixed = sum(costs[s].optimizer_bytes + costs[s].gradient_bytes for s in stages)
        assert fixed + timeline.peak_bytes(worker) == peak


@pytest.mark.parametrize(
    ("name", "remat"),
    [*((name, "none") for name in ALGORITHMS), ("one_f_one_b", "full"), ("zero_bubble_v", "full")],
)
def test_the_bytes_that_are_counted_are_those_of_the_arrays(name, remat):
    pipe, state, _ = run(name, 2, 3, remat=remat)
    batch = case().make_batch(pipe.schedule.num_microbatches * zoo.MICROBATCH, 0)
    current, most = state.run, [0, 0]

    def observe(kind, stage, microbatch, made):
        del kind, microbatch, made
        worker = pipe.schedule.worker_of(stage)
        held = [current.stages[s] for s in pipe.schedule.stages_of(worker)]
        stash = [x for each in held for kept in each.in_flight.stash.values() for x in kept.values]
        stash += [
            x for each in held for kept in each.in_flight.pending.values() for x in kept.values
        ]
        assert sum(x.nbytes for x in stash) == current.workers[worker].stash_bytes
        most[worker] = max(most[worker], current.workers[worker].stash_bytes)
        versions = 0
        for each in held:
            lasting, waiting = each.lasting, each.in_flight
            pinned = [e.weights for e in (*waiting.stash.values(), *waiting.pending.values())]
            old = waiting.old_versions.values()
            alive = {id(w) for w in (lasting.weights, *old, *pinned) if w}
            versions += len(alive) * lasting.weight_bytes
        assert versions == current.workers[worker].version_bytes

    state.executor.observer = observe
    for _ in range(4):
        state, _ = pipe.step(state, batch)
    state = pipe.drain(state)
    assert max(most) > 0 or remat == "full"


def test_a_simulation_takes_the_time_of_the_profile():
    pipe, _, _ = run("gpipe", 2, 3)
    bounds = [*pipe.plan.first_layers, len(pipe.plan.layers)]
    first, second = (b - a for a, b in pairwise(bounds))
    timeline = pipe.simulate(flat_profile(pipe.plan))
    slow = max(first, second)
    assert timeline.makespan_s == first + second + 2 * slow + 2 * (first + second + 2 * slow)


@pytest.mark.parametrize("name", ["gpipe", "zero_bubble_h1", "pipedream"])
def test_a_simulation_knows_what_is_recomputed(name):
    """On one worker nobody waits: then the seconds of all passes add up."""
    for remat, seconds in (("none", 3), ("full", 4)):  # for each layer
        pipe, _, _ = run(name, 1, 3, remat=remat)
        timeline = pipe.simulate(flat_profile(pipe.plan))
        expected = seconds * len(pipe.plan.layers) * pipe.schedule.num_microbatches
        assert timeline.makespan_s == expected


def test_a_stage_may_recompute_and_another_not():
    pipe, state, _ = run("one_f_one_b", 2, 3, remat=("full", "none"))
    profile = flat_profile(pipe.plan)
    first, second = state.training.prepared.stage_costs(profile)
    assert first.backward_s == 3 * first.forward_s
    assert second.backward_s == 2 * second.forward_s
    sent = {pair: size / STEPS for pair, size in pipe.counts(state).link_bytes.items()}
    assert pipe.simulate(profile).link_bytes == sent


def test_a_profile_of_another_model_is_refused():
    pipe, _, _ = run("gpipe", 2, 3)
    other = Profile((LayerProfile("other", 1.0, 2.0, 0.0, 0.0),))
    with pytest.raises(ValueError, match="expected that of this model"):
        pipe.simulate(other)


def test_counting_goes_on_over_batches_of_other_shapes():
    pipe, state, _ = run("one_f_one_b", 2, 2)
    before = pipe.counts(state)
    state, _ = pipe.step(state, case().make_batch(8, 0))
    after = pipe.counts(state)
    assert after.actions[0]["F"] == before.actions[0]["F"] + 2
    assert after.link_bytes[0, 1] > before.link_bytes[0, 1]


def test_the_parts_of_a_backward_pass_share_its_time_by_their_work():
    """Attention has products of activations only, so that the input part has more of them."""
    transformer = zoo.transformer()
    pipe = pdjax.Pipeline(
        transformer.loss_fn,
        optax.sgd(0.1),
        schedule="zero_bubble_h1",
        num_microbatches=2,
        plan=["block_0/norm_attention", "block_1/mlp_in"],
    )
    state = pipe.init(transformer.params, transformer.make_batch(4, 0))
    profile = flat_profile(pipe.plan)
    first, attention, dense = state.training.prepared.stage_costs(profile)
    for cost in (first, attention, dense):
        assert cost.input_part_s + cost.weight_part_s == pytest.approx(cost.backward_s)
    assert first.input_s == first.weight_s  # nobody divides it
    assert attention.input_part_s > attention.weight_part_s
    assert attention.input_part_s / attention.backward_s > dense.input_part_s / dense.backward_s


@pytest.mark.parametrize("name", ["one_f_one_b", "zero_bubble_v"])
def test_the_bytes_that_are_counted_are_those_that_are_sent(name):
    """With a skip connection, so that a stage sends different values to different stages."""

    def loss_fn(params, batch):
        skipped = jnp.tanh(batch["x"] @ params["a"])
        wide = jnp.tanh(skipped[:, :1] @ params["b"])
        return jnp.mean((jnp.tanh(wide @ params["c"]) @ params["d"] + skipped) ** 2)

    shapes = {"a": (3, 5), "b": (1, 8), "c": (8, 2), "d": (2, 5)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    batch = {"x": jnp.ones((6, 3))}
    pipe = pdjax.Pipeline(loss_fn, optax.sgd(0.1), schedule=name, num_stages=4, num_microbatches=3)
    state = pipe.init(params, batch)
    sent = Counter()

    class Counting(LocalTransport):
        def send_recv(self, values, shapes, source, target):
            pair = pipe.schedule.worker_of(source), pipe.schedule.worker_of(target)
            sent[pair] += sum(value.nbytes for value in values or ()) * (pair[0] != pair[1])
            return super().send_recv(values, shapes, source, target)

    state.executor.transport = Counting(4)
    state, _ = pipe.step(state, batch)
    assert pipe.counts(state).link_bytes == {pair: size for pair, size in sent.items() if size}
