"""What a Pipeline does that is given no plan, or a planned one."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
import zoo

import pdjax
from pdjax import cache
from pdjax.plan import PlanOptions
from pdjax.profile import cached
from pdjax.profile.rates import Rates
from pdjax.profile.roofline import estimate
from pdjax.simulate import plan_pipeline
from pdjax.trace.layers import build_graph
from pdjax.trace.random_key import taking_key

CASE = zoo.dense_blocks()
BATCH = CASE.make_batch(8, 0)
RATES = Rates(1e10, 1e10, "")
LINKS = "4@1GB/s"


def make_profile():
    loss_fn = taking_key(CASE.loss_fn, stateful=False)
    graph = build_graph(loss_fn, CASE.params, BATCH, jax.random.key(0))
    return estimate(graph, RATES, batch_size=8)


@pytest.fixture
def measured(monkeypatch):
    """What was profiled; the figures are estimates, so that plans do not depend on the clock."""
    asked = []

    def measure(graph, *, batch_size, **_):
        asked.append(graph.names)
        profile = estimate(graph, RATES, batch_size=batch_size)
        return replace(profile, device=jax.devices()[0].device_kind, source="measured")

    monkeypatch.setattr(cached, "measure", measure)
    cache.forget()
    return asked


def make_pipe(case=CASE, **options):
    return pdjax.Pipeline(case.loss_fn, optax.sgd(0.1), **{"plan": "auto", **options})


def test_by_default_the_planner_decides(measured, cache_directory, monkeypatch):
    monkeypatch.undo()  # the real default, and a real measurement
    pipe = pdjax.Pipeline(CASE.loss_fn, optax.adam(0.1), num_stages=2, num_microbatches=1)
    state = pipe.init(CASE.params, BATCH)
    assert pipe.plan.prediction is not None
    assert pipe.plan.prediction.source == "measured"
    assert pipe.plan.num_stages == 2
    assert pipe.plan.stages[0].peak_bytes > 0
    _, metrics = pipe.step(state, BATCH)
    assert np.isfinite(float(metrics["loss"]))


def test_it_trains_as_any_other_plan(measured, cache_directory):
    results = []
    for plan in ("auto", "balanced"):
        pipe = make_pipe(plan=plan, num_stages=3, num_microbatches=2)
        state = pipe.init(CASE.params, BATCH)
        for _ in range(2):
            state, _ = pipe.step(state, BATCH)
        results.append(pipe.params(state))
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_model_is_profiled_once(measured, cache_directory):
    first = make_pipe(num_stages=2, topology=LINKS)
    first.init(CASE.params, BATCH)
    again = make_pipe(num_stages=2, topology=LINKS)
    again.init(CASE.params, BATCH)
    assert len(measured) == 1
    assert again.plan == first.plan
    cache.forget()  # as in another process
    make_pipe(num_stages=3, topology=LINKS).init(CASE.params, BATCH)
    assert len(measured) == 1
    assert list(cache_directory.glob("pdjax-profile-*.json"))
    make_pipe(num_stages=2, num_microbatches=2).init(CASE.params, BATCH)
    assert len(measured) == 2


def test_a_broken_file_is_measured_anew(measured, cache_directory):
    make_pipe(num_stages=2).init(CASE.params, BATCH)
    for file in cache_directory.glob("pdjax-*.json"):
        file.write_text('{"half')
    cache.forget()
    make_pipe(num_stages=2).init(CASE.params, BATCH)
    assert len(measured) == 2


@pytest.mark.parametrize("text", ["null", "{}", "3", '{"format": 1, "layers": []}'])
def test_a_file_that_holds_something_else_is_measured_anew(measured, cache_directory, text):
    make_pipe(num_stages=2).init(CASE.params, BATCH)
    for file in cache_directory.glob("pdjax-*.json"):
        file.write_text(text)
    cache.forget()
    make_pipe(num_stages=2).init(CASE.params, BATCH)
    assert len(measured) == 2


def test_models_that_differ_only_in_a_tie_are_told_apart(measured, cache_directory):
    def loss_fn(params, batch):
        hidden = batch["x"] @ params["a"]["w"] @ params["b"]["w"]
        return (hidden @ params["c"]["w"]).var()

    def tied(params, batch):
        return loss_fn({**params, "c": params["a"]}, batch)

    params = {name: {"w": np.ones((4, 4), np.float32)} for name in "abc"}
    batch = {"x": np.ones((8, 4), np.float32)}
    for function, expected in ((loss_fn, ()), (tied, ((0, 2),))):
        pipe = pdjax.Pipeline(function, optax.sgd(0.1), schedule="pipedream")
        assert pipe.profile(params, batch).tied == expected
    half = {name: {"w": leaf["w"].astype(np.float16)} for name, leaf in params.items()}
    assert pipe.profile(half, batch).dtype == "float16"


def test_one_stage_must_fit_too(measured, cache_directory):
    for pipe in (
        make_pipe(topology="1@1GB/s:1kB", num_stages=1),
        make_pipe(topology="1@1GB/s:1kB", devices=jax.devices()[:1]),
    ):
        with pytest.raises(ValueError, match="no plan fits"):
            pipe.init(CASE.params, BATCH)


def test_a_plan_must_fit_the_topology_that_is_given():
    plan = plan_pipeline(make_profile(), pdjax.Topology.parse(LINKS), PlanOptions(replicate=False))
    make_pipe(plan=plan, schedule="pipedream", topology="4@1GB/s:1GiB")
    for topology, message in (("2@1GB/s", "on worker 2"), ("4@1GB/s:1kB", "worker 0 of .* has")):
        with pytest.raises(ValueError, match=message):
            make_pipe(plan=plan, topology=topology)
    with pytest.warns(pdjax.PdjaxWarning, match="made for the schedule 'pipedream'"):
        make_pipe(plan=plan, schedule="gpipe").init(CASE.params, BATCH)


def test_one_stage_needs_no_profile(measured, cache_directory):
    make_pipe(num_stages=1).init(CASE.params, BATCH)
    make_pipe(devices=jax.devices()[:1]).init(CASE.params, BATCH)
    assert measured == []


def test_the_planner_may_leave_devices_idle(measured, cache_directory):
    """Over links this slow nothing is gained by a second device."""
    pipe = make_pipe(topology="4@1kB/s")
    state = pipe.init(CASE.params, BATCH)
    assert pipe.plan.num_stages == 1
    assert {leaf.device for leaf in state.run.stages[0].lasting.weights} == {jax.devices()[0]}
    pipe = make_pipe(topology="4@100TB/s", num_microbatches=8)
    pipe.init(CASE.params, BATCH)
    assert pipe.plan.num_stages > 1


def test_stages_go_to_their_workers(measured, cache_directory):
    """The first worker is too small for anything."""
    pipe = make_pipe(schedule="pipedream", topology="4@1GB/s:1*1kB,3*1GB", num_stages=2)
    state = pipe.init(CASE.params, BATCH)
    workers = [stage.workers[0] for stage in pipe.plan.stages]
    assert 0 not in workers
    for worker, stage in zip(workers, state.run.stages, strict=True):
        assert {leaf.device for leaf in stage.lasting.weights} == {jax.devices()[worker]}


def test_stages_recompute_where_memory_is_short(measured, cache_directory):
    profile = make_profile()
    rows = tuple(replace(layer, stash_bytes=2**30) for layer in profile.layers)
    greedy = replace(profile, layers=rows, device="")
    options = {"schedule": "pipedream", "num_stages": 2, "topology": "2@1GB/s:3200MiB"}
    pipe = make_pipe(profile=greedy, **options)
    state = pipe.init(CASE.params, BATCH)
    assert "full" in pipe.plan.remat
    state, metrics = pipe.step(state, BATCH)
    assert np.isfinite(float(metrics["loss"]))
    with pytest.raises(ValueError, match="no plan fits"):
        make_pipe(profile=greedy, remat="none", **options).init(CASE.params, BATCH)


# ---------------------------------------------------------------- plans and profiles by hand


def test_a_plan_from_a_file(tmp_path):
    profile = make_profile()
    plan = plan_pipeline(profile, pdjax.Topology.parse(LINKS), PlanOptions(replicate=False))
    plan.save(tmp_path / "plan.json")
    for given in (plan, str(tmp_path / "plan.json"), tmp_path / "plan.json"):
        pipe = make_pipe(plan=given, schedule="pipedream")
        pipe.init(CASE.params, BATCH)
        assert pipe.plan == plan


def test_a_plan_of_another_model_is_refused():
    profile = make_profile()
    plan = plan_pipeline(profile, pdjax.Topology.parse(LINKS), PlanOptions(replicate=False))
    with pytest.raises(ValueError, match="another model: its fingerprint is"):
        make_pipe(plan=replace(plan, model="0" * 16)).init(CASE.params, BATCH)
    with pytest.raises(ValueError, match=r"another model.*differing"):
        make_pipe(plan=replace(plan, layers=("x", *plan.layers[1:]))).init(CASE.params, BATCH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "best"}, r"plan='best'; expected 'auto', 'balanced', a Plan, .*\['best'\]"),
        ({"plan": "none.json"}, "cannot read the plan 'none.json'"),
        ({"topology": "4x"}, "topology '4x' gives no bandwidth"),
        ({"topology": 3}, "topology=3; expected a Topology"),
        ({"profile": 3}, "profile=3; expected a Profile"),
        ({"plan": 5}, "plan=5; expected 'auto'"),
        ({"plan": "balanced", "topology": "4@1GB/s"}, "topology and profile serve plan='auto'"),
        ({"profile": "none.json"}, "cannot read the profile none.json"),
        ({"num_stages": 6}, "6 stages need as many devices, but there are 5"),
        ({"remat": ["none", "full"], "num_stages": 3}, "disagree about the number of stages"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        make_pipe(**options)


def test_machines_and_profiles_that_do_not_go_with_the_model(measured, cache_directory):
    with pytest.raises(ValueError, match="has 8 workers, but there are 5 devices"):
        make_pipe(topology="8@1GB/s").init(CASE.params, BATCH)
    profile = make_profile()
    other = replace(profile, device="TPU v9", source="measured")
    with pytest.raises(ValueError, match="'TPU v9'"):
        make_pipe(profile=other, num_stages=2, topology=LINKS).init(CASE.params, BATCH)
    few = pdjax.Pipeline(lambda p, b: (p * b).sum(), optax.sgd(0.1), plan="auto", num_stages=2)
    with pytest.raises(ValueError, match="2 stages need at least as many layers"):
        few.init(np.ones(3), np.ones(3))
    assert measured == []
