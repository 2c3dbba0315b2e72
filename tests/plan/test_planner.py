"""From profiles and machines to plans: what is chosen, what is said, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdjax.plan import Plan, PlanOptions, search_plan
from pdjax.plan.planner import memory_form
from pdjax.profile.profile import LayerProfile, Profile
from pdjax.schedules import Action, find_algorithm
from pdjax.schedules.versions import delay_of, peak_in_flight, peak_versions
from pdjax.topology.topology import Level, Topology


def make_profile(rows, **about):
    """A profile from rows of (forward_s, backward_s, cut, param, stash bytes)."""
    layers = tuple(LayerProfile(f"layer_{i}", *row) for i, row in enumerate(rows))
    return Profile(layers, **about)


def predicted(plan):
    assert plan.prediction is not None
    return plan.prediction


EVEN = make_profile([(1e-3, 2e-3, 1e6, 4e6, 2e6)] * 8, batch_size=32)

# ---------------------------------------------------------------- what is chosen

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
SIDES = (224, 224, 112, 112, 56, 56, 56, 28, 28, 28, 14, 14, 14)


def vgg16(batch_size=64, flops_per_s=2e13):
    """VGG-16 from its shapes alone (arXiv 1409.1556, table 1), for a device of a certain rate."""
    rows, before = [], 3
    for at, (width, side) in enumerate(zip(WIDTHS, SIDES, strict=True)):
        params = 9 * before * width
        seconds = 2 * params * side * side * batch_size / flops_per_s
        pooled = at + 1 == len(SIDES) or SIDES[at + 1] < side
        out = 4 * batch_size * width * (side // (2 if pooled else 1)) ** 2
        rows.append((seconds, 2 * seconds, out, 4 * params, 4 * batch_size * width * side**2))
        before = width
    for inputs, outputs in ((25088, 4096), (4096, 4096), (4096, 1000)):
        seconds = 2 * inputs * outputs * batch_size / flops_per_s
        sizes = 4 * batch_size * outputs, 4 * inputs * outputs, 4 * batch_size * outputs
        rows.append((seconds, 2 * seconds, *sizes))
    return make_profile(rows, batch_size=batch_size)


def lstm_model(num_layers=8, width=1024, length=50, batch_size=64, flops_per_s=6e12):
    """Equal LSTM layers: many parameters for little time, small activations."""
    params = 8 * width * width
    seconds = 2 * params * length * batch_size / flops_per_s
    out = 4 * batch_size * length * width
    return make_profile([(seconds, 2 * seconds, out, 4 * params, 6 * out)] * num_layers)


def test_vgg_wants_its_convolutions_replicated_and_its_dense_layers_not():
    plan = search_plan(vgg16(), Topology.parse("16@1.25GB/s"))
    assert plan.notation == "15-1"
    assert plan.first_layers == (0, 13)


def test_lstm_layers_want_a_straight_pipeline():
    assert search_plan(lstm_model(), Topology.parse("4@1.25GB/s")).notation == "1-1-1-1"


def test_little_weight_and_fast_links_want_data_parallelism():
    rows = [(4e-3, 8e-3, 5e7, 4e5, 1e8)] * 50
    topology = Topology.parse("8x2@25GB/s,3GB/s")
    plan = search_plan(make_profile(rows), topology, PlanOptions(overlap=True))
    assert plan.notation == "16"
    assert "data parallelism on 16 workers" in predicted(plan).advice


def test_one_worker_is_advised_where_more_help_nothing():
    plan = search_plan(make_profile([(1.0, 1.0, 0, 1e12)]), Topology.parse("4@1MB/s"))
    assert plan.notation == "1"
    assert predicted(plan).advice.startswith("Use one worker")


def test_a_flushed_pipeline_may_be_shorter_than_there_are_workers():
    """With one microbatch a pipeline only ever fills and drains."""
    options = PlanOptions(schedule="one_f_one_b", num_microbatches=1, replicate=False)
    assert search_plan(EVEN, Topology.parse("4@1GB/s"), options).num_stages == 1
    many = replace(options, num_microbatches=32)
    assert search_plan(EVEN, Topology.parse("4@1GB/s"), many).num_stages == 4


def test_the_bubble_is_that_of_the_formula():
    """Equal stages that send nothing: (m + n - 1) / m times the stage's time."""
    profile = make_profile([(1e-3, 2e-3, 0, 1, 0)] * 4)
    for name in ("gpipe", "one_f_one_b"):
        options = PlanOptions(schedule=name, num_microbatches=6, num_stages=4, replicate=False)
        prediction = predicted(search_plan(profile, Topology.parse("4@1GB/s"), options))
        assert prediction.minibatch_s == pytest.approx((6 + 3) * 3e-3)


def test_without_pipelining_every_microbatch_goes_through_alone():
    profile = make_profile([(1e-3, 2e-3, 0, 1, 0)] * 8)
    options = PlanOptions("model_parallel", 4, num_stages=4, replicate=False)
    plan = search_plan(profile, Topology.parse("4@1GB/s"), options)
    assert predicted(plan).minibatch_s == pytest.approx(4 * 8 * 3e-3)


@pytest.mark.parametrize(("num_microbatches", "minibatch_s"), [(1, 24e-3), (4, 24e-3), (6, 48e-3)])
def test_replicas_of_a_flushed_stage_share_the_microbatches(num_microbatches, minibatch_s):
    """Each does a whole number of them: of six, two of the four workers do two."""
    profile = make_profile([(1e-3, 2e-3, 1e3, 1, 0)] * 8)
    options = PlanOptions("one_f_one_b", num_microbatches, overlap=True)
    prediction = predicted(search_plan(profile, Topology.parse("4@10GB/s"), options))
    assert prediction.others[0].name == "data parallelism"
    assert prediction.others[0].microbatch_s * num_microbatches == pytest.approx(minibatch_s)
    assert prediction.minibatch_s <= minibatch_s * (1 + 1e-9)


def test_a_flushed_plan_is_never_slower_than_one_worker():
    for topology in ("4@1kB/s", "2x2@1kB/s,1kB/s"):
        options = PlanOptions("gpipe", 2)
        plan = search_plan(EVEN, Topology.parse(topology), options)
        assert plan.notation == "1"
        assert predicted(plan).advice == ("Use one worker: more of them would be no faster here.")


def test_advice_names_what_would_be_faster():
    plan = search_plan(EVEN, Topology.parse("4@1GB/s"), PlanOptions(num_stages=1, replicate=False))
    advice = predicted(plan).advice
    assert advice == "Use one worker; GPipe, 16 microbatches would be 3.2 times as fast."


def test_a_link_that_limits_is_named():
    profile = make_profile([(1e-3, 2e-3, 1e7, 1e9, 0)] * 2)
    plan = search_plan(profile, Topology.parse("2@4GB/s"), PlanOptions(num_stages=2))
    assert "A link limits it: what crosses a cut takes 5 ms, the busiest stage 3 ms." in (
        predicted(plan).advice
    )


def test_full_rematerialisation_is_planned_as_such():
    profile = make_profile([(1e-3, 2e-3, 1e5, 1e6, 1e8)] * 4)
    topology, options = Topology.parse("2@10GB/s"), PlanOptions(replicate=False, remat="full")
    plan = search_plan(profile, topology, options)
    assert plan.remat == ("full", "full")
    assert predicted(plan).minibatch_s == pytest.approx(8e-3)
    assert plan.stages[0].peak_bytes < search_plan(profile, topology).stages[0].peak_bytes


def test_layers_stay_together():
    topology = Topology.parse("4@1GB/s")
    options = PlanOptions(replicate=False, together=((1, 3),))
    assert set(search_plan(EVEN, topology, options).first_layers).isdisjoint({2, 3})


def test_tied_layers_stay_together_under_asynchronous_schedules_only():
    profile = replace(EVEN, tied=((0, 7),), inseparable=((2, 3),))
    topology, alone = Topology.parse("4@1GB/s"), PlanOptions(replicate=False, num_stages=1)
    assert search_plan(profile, topology, alone).num_stages == 1
    with pytest.raises(ValueError, match="at most 1 stages"):
        search_plan(profile, topology, replace(alone, num_stages=2))
    flushed = PlanOptions("one_f_one_b", 8, num_stages=4, replicate=False)
    assert 3 not in search_plan(profile, topology, flushed).first_layers


# ---------------------------------------------------------------- properties

amounts = st.integers(0, 40).map(float)
rows = st.lists(st.tuples(amounts, amounts, amounts, amounts, amounts), min_size=1, max_size=9)
shapes = st.sampled_from([(4,), (6,), (2, 3), (3, 2)])


def topology_of(shape, bandwidth, memory=None):
    levels = tuple(Level(units, bandwidth / (at + 1)) for at, units in enumerate(shape))
    count = math.prod(shape)
    return Topology(levels, () if memory is None else (memory,) * count)


def seconds_of(rows, topology):
    try:
        return predicted(search_plan(make_profile(rows), topology)).minibatch_s
    except ValueError:
        return math.inf


def not_more(a, b):
    return a <= b * (1 + 1e-8)


@settings(deadline=None, max_examples=40)
@given(rows, shapes, st.sampled_from([1.0, 4.0]), st.integers(50, 1500), st.integers(1, 800))
def test_more_never_makes_it_slower(rows, shape, bandwidth, memory, more):
    before = seconds_of(rows, topology_of(shape, bandwidth, memory))
    assert not_more(seconds_of(rows, topology_of(shape, 2 * bandwidth, memory)), before)
    assert not_more(seconds_of(rows, topology_of(shape, bandwidth, memory + more)), before)
    for level in range(len(shape)):
        larger = tuple(n + (at == level) for at, n in enumerate(shape))
        assert not_more(seconds_of(rows, topology_of(larger, bandwidth, memory)), before)


ZEROS = (0.0,) * 5


def counted_bytes(profile, plan, stage):
    """Peak bytes of a worker, by walking through what it does: an account of its own."""
    figures = plan.stages[stage]
    worker = [Action("F", stage, k) for k in range(figures.warm_up)]
    for k in range(2 * figures.warm_up + 2):  # what is in flight together also ends
        worker += [Action("F", stage, k + figures.warm_up)]
        worker += [Action("B", stage, k), Action("U", stage, k)]
    rule = find_algorithm("pipedream").weight_rule
    versions, in_flight = peak_versions(worker, stage, rule), peak_in_flight(worker, stage)
    bounds = [*plan.first_layers, len(plan.layers)]
    layers = profile.layers[bounds[stage] : bounds[stage + 1]]
    params, stash = (sum(getattr(x, f) for x in layers) for f in ("param_bytes", "stash_bytes"))
    before = profile.layers[bounds[stage] - 1].cut_bytes if stage else 0
    after = layers[-1].cut_bytes if stage + 1 < plan.num_stages else 0
    kept = in_flight * stash if figures.remat == "none" else in_flight * before + stash
    return (versions + 1 + 2) * params + kept + 2 * (before + after)


@settings(deadline=None, max_examples=60)
@given(rows, shapes, st.integers(50, 1500))
@example(
    rows=[ZEROS] * 6 + [(0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 1.0, 0.0)], shape=(4,), memory=50
)
def test_no_plan_exceeds_the_memory(rows, shape, memory):
    profile = make_profile(rows)
    topology = topology_of(shape, 2.0, memory)
    if math.isinf(seconds_of(rows, topology)):
        with pytest.raises(ValueError, match="no plan fits"):
            search_plan(profile, topology)
        return
    plan = search_plan(profile, topology)
    for stage in range(plan.num_stages):
        counted = counted_bytes(profile, plan, stage)
        assert counted <= memory
        assert counted == pytest.approx(plan.stages[stage].peak_bytes)
    assert predicted(plan).chosen.fits


@pytest.mark.parametrize(
    "name",
    ["model_parallel", "gpipe", "one_f_one_b", "zero_bubble_h1", "pipedream", "pipedream_2bw"],
)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_the_memory_form_is_what_the_schedule_does(name, num_stages):
    """Versions and microbatches in flight, against those of the schedule's own lists."""
    algorithm = find_algorithm(name)
    m = 6 if algorithm.divides else 1
    form = memory_form(algorithm, m, 2.0, remat="none")
    schedule = algorithm.make(num_stages, m)
    workers, delay = schedule.unroll(12), delay_of(algorithm.weight_rule, schedule)
    for stage, worker in enumerate(workers):
        warm_up = num_stages - 1 - stage
        assert form.in_flight(warm_up) == peak_in_flight(worker, stage)
        versions = peak_versions(worker, stage, algorithm.weight_rule, m, delay)
        assert form.param_copies(warm_up) == versions + 1 + 2


# ---------------------------------------------------------------- what is said


def test_the_table():
    profile = make_profile([(1e-3, 2e-3, 1e5, 2**20, 2**20)] * 4, batch_size=10)
    options = PlanOptions(replicate=False, overlap=True)
    assert str(search_plan(profile, Topology.parse("2@1GB/s:64MiB"), options)) == TABLE


def test_passes_wait_for_an_all_reduce_unless_updates_are_late():
    profile = make_profile([(1e-3, 2e-3, 1e5, 2**20, 2**20)] * 4)
    sync_s = 4 * 2**20 / 1e9
    for overlap, both_s in ((False, 12e-3 + sync_s), (True, 12e-3)):
        options = PlanOptions(replicate=False, overlap=overlap)
        others = predicted(search_plan(profile, Topology.parse("2@1GB/s"), options)).others
        assert others[0].name == "data parallelism"
        assert others[0].microbatch_s == pytest.approx(both_s / 2)


TABLE = """\
stage  layers                 workers  time  share  in flight  weights    stash      peak     limit
0      layer_0 … layer_1 (2)  1: 0     6 ms  50.0%          2  2.0 MiB  2.0 MiB  14.2 MiB  64.0 MiB
1      layer_2 … layer_3 (2)  1: 1     6 ms  50.0%          1  2.0 MiB  2.0 MiB  10.2 MiB  64.0 MiB

                             workers  microbatch  examples/s  sent/example      peak
this plan, 1-1               2              6 ms       1,667      19.5 KiB  14.2 MiB
data parallelism             2              6 ms       1,667     409.6 KiB  20.0 MiB
model parallelism, 2 stages  2           12.2 ms         820      19.5 KiB  10.2 MiB
GPipe, 8 microbatches        2           6.78 ms       1,476      19.5 KiB  24.2 MiB
one worker                   1             12 ms         833           0 B  20.0 MiB

Use a straight pipeline of 2 stages (2.0 times one worker); data parallelism would be about as \
fast."""


def test_recomputation_is_said_with_its_price():
    profile = make_profile([(1e-3, 2e-3, 1e6, 1e6, 1e8)] * 8)
    plan = search_plan(profile, Topology.parse("4@100GB/s:1GiB"), PlanOptions(replicate=False))
    assert plan.remat == ("none",) * 4
    smaller = Topology.parse("4@100GB/s:600MiB")
    plan = search_plan(profile, smaller, PlanOptions(replicate=False))
    assert plan.remat[0] == "full"
    assert plan.remat[-1] == "none"
    assert "recompute" in predicted(plan).advice
    assert "adds up to 2 ms for each microbatch" in predicted(plan).advice
    smallest = Topology.parse("4@100GB/s:350MiB")
    assert set(search_plan(profile, smallest, PlanOptions(replicate=False)).remat) == {
        "full",
        "none",
    }
    with pytest.raises(ValueError, match="rematerialisation"):
        search_plan(profile, smallest, PlanOptions(replicate=False, remat="none"))


def test_when_nothing_fits_the_text_says_by_how_much_and_what_helps():
    profile = make_profile([(1e-3, 2e-3, 1e6, 2**20, 2**20)] * 4)
    topology = Topology.parse("2@1GB/s:13MiB")
    with pytest.raises(ValueError, match="no plan fits") as caught:
        search_plan(profile, topology, PlanOptions(replicate=False))
    text = str(caught.value)
    missing = float(text.partition("lacks ")[2].partition(" KiB")[0])
    assert "twice as many workers" in text
    search_plan(profile, Topology.parse("4@1GB/s:13MiB"), PlanOptions(replicate=False))
    assert "one_f_one_b" in text
    search_plan(profile, topology, PlanOptions("one_f_one_b", replicate=False))
    for more, fits in ((missing - 0.1, False), (missing + 0.1, True)):
        larger = Topology.uniform(2, 1e9, int(13 * 2**20 + more * 2**10))
        if fits:
            search_plan(profile, larger, PlanOptions(replicate=False))
        else:
            with pytest.raises(ValueError, match="no plan fits"):
                search_plan(profile, larger, PlanOptions(replicate=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "1f1b"}, "unknown schedule"),
        ({"num_microbatches": 0}, "num_microbatches=0; expected at least 1"),
        ({"num_stages": 0}, "num_stages=0"),
        ({"num_stages": 9}, "9 stages need at least as many layers, but the profile has 8"),
        ({"num_stages": 5}, "5 stages need at least as many workers.*has 4"),
        ({"num_stages": 4, "together": ((0, 6),)}, "must stay together.*at most 2 stages"),
        ({"together": ((3, 9),)}, r"together has \(3, 9\); expected"),
        ({"num_microbatches": 4}, "pipedream runs a minibatch as one microbatch"),
        ({"optimizer_bytes_per_param_byte": math.nan}, "optimizer_bytes_per_param_byte=nan"),
        ({"sync": "tree"}, "sync='tree'; expected 'ring'"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        search_plan(EVEN, Topology.parse("4@1GB/s"), PlanOptions(**options))


# ---------------------------------------------------------------- files


def test_a_plan_survives_a_file(tmp_path):
    plan = search_plan(EVEN, Topology.parse("2x2@10GB/s,1GB/s:1GiB"))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    bare = Plan(("a", "b"), (0, 1))
    assert Plan.from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("first_layers"), "plan.json: plan: missing first_layers"),
        (lambda value: value.update(format=99), "plan.json: expected format 1"),
        (lambda value: value.update(first_layers=[0, 9]), "plan.json: stages begin at layers"),
        (
            lambda value: value["stages"][0].pop("warm_up"),
            r"plan.json: stage 0: missing warm_up\.",
        ),
        (
            lambda value: value.update(more=[1]),
            r"plan.json: plan: unknown more; known are layers",
        ),
        (lambda value: value["stages"].pop(), "plan.json: 3 stages for 4"),
        (lambda value: value["stages"][1].update(workers=[0]), "a worker has two stages"),
        (lambda value: value["stages"][1].update(workers=[-1]), "expected different numbers"),
        (lambda value: value["stages"][1].update(workers="1"), "workers is '1'; expected a list"),
        (lambda value: value["stages"][1].update(workers=[]), "expected different numbers"),
        (lambda value: value["stages"][1].update(warm_up="two"), "warm_up is 'two'"),
        (lambda value: value["stages"][1].update(remat=None), "remat is None"),
        (lambda value: value["stages"][1].update(peak_bytes=math.nan), "peak_bytes is nan"),
        (lambda value: value["stages"][1].update(limit_bytes="16GiB"), "limit_bytes is '16GiB'"),
        (lambda value: value.update(stages={}), "stages is {}; expected a list"),
        (lambda value: value.update(first_layers=[0, 1.5]), "expected whole numbers"),
        (lambda value: value.update(layers=[1] * 8), "expected the names of the layers"),
        (lambda value: value["prediction"].update(num_microbatches="4"), "num_microbatches is '4'"),
        (lambda value: value["prediction"]["chosen"].pop("fits"), "chosen: missing fits"),
    ],
)
def test_files_that_are_no_plan(tmp_path, change, message):
    plan = search_plan(EVEN, Topology.parse("4@1GB/s"), PlanOptions(replicate=False))
    value = json.loads(plan.to_json())
    change(value)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_file_that_is_not_there_or_broken(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the plan .*pdjax\.plan"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"first_layers": [0],\n"layers": ')
    with pytest.raises(ValueError, match=r"half.json, line 2"):
        Plan.load(tmp_path / "half.json")
