"""What stages cost, and the schedules for a plan side by side."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate

import pytest

from pdjax.plan import Plan, PlanOptions, balanced_plan
from pdjax.profile.profile import LayerProfile, Profile
from pdjax.schedules import ALGORITHMS, Schedule, gpipe, interleaved, one_f_one_b
from pdjax.simulate import (
    StageCost,
    choose,
    compare,
    peak_bytes,
    plan_pipeline,
    simulate,
    stage_costs,
)
from pdjax.simulate.comparison import describe
from pdjax.topology.topology import Topology

LAYER = LayerProfile("", 1.0, 2.0, cut_bytes=1000, param_bytes=100, stash_bytes=2000)


def make_profile(num_layers: int = 8, **fields) -> Profile:
    layers = tuple(replace(LAYER, name=f"layer_{at}", **fields) for at in range(num_layers))
    return Profile(layers, batch_size=10)


def make_plan(profile: Profile, topology: str = "4@1GB/s", num_stages=4, **options) -> Plan:
    """A straight pipeline of four stages, unless told otherwise."""
    options = {"num_stages": num_stages, "replicate": num_stages != 4} | options
    return plan_pipeline(profile, Topology.parse(topology), PlanOptions(**options))


# ---------------------------------------------------------------- costs


def test_the_costs_of_stages_are_the_sums_of_their_layers():
    profile = make_profile()
    costs = stage_costs(make_plan(profile), profile, optimizer_bytes_per_param_byte=1)
    assert costs[1] == StageCost(
        forward_s=2,
        backward_s=4,
        input_s=2,
        weight_s=2,
        param_bytes=200,
        optimizer_bytes=200,
        gradient_bytes=200,
        stash_bytes=4000,
        held_bytes=4000,
        pass_bytes=4000,
        sends=((2, 1000),),
        returns=((0, 1000),),
    )
    assert (costs[0].returns, costs[3].sends) == ((), ())
    assert (costs[0].pass_bytes, costs[3].pass_bytes) == (2000, 2000)


def test_a_stage_that_recomputes_keeps_its_input():
    profile = make_profile()
    plan = make_plan(profile, remat="full")
    cost = stage_costs(plan, profile)[1]
    assert (cost.backward_s, cost.input_part_s, cost.weight_part_s) == (6, 4, 2)
    assert (cost.stash_bytes, cost.held_bytes, cost.pass_bytes) == (1000, 4000, 8000)
    alone = stage_costs(plan)[1]
    assert (alone.backward_s, alone.input_part_s, alone.stash_bytes) == (6, 4, 1000)


def test_a_plan_alone_says_what_its_profile_says():
    profile = make_profile()
    plan = make_plan(profile)
    assert stage_costs(plan) == stage_costs(plan, profile)
    assert stage_costs(Plan.from_json(plan.to_json())) == stage_costs(plan, profile)


@pytest.mark.parametrize("name", ["pipedream", "gpipe", "one_f_one_b", "model_parallel"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_peaks_are_those_that_the_planner_predicts(name, remat):
    algorithm = ALGORITHMS[name]
    count = 6 if algorithm.divides else 1
    profile = make_profile()
    options = {"schedule": name, "num_microbatches": count, "remat": remat}
    plan = make_plan(profile, **options)
    costs = stage_costs(plan, profile)
    counted = peak_bytes(algorithm.make(4, count), costs, algorithm.weight_rule)
    assert counted == tuple(stage.peak_bytes for stage in plan.stages)


def test_a_plan_that_predicts_nothing_needs_a_profile():
    profile = make_profile()
    plan = balanced_plan(profile.names, profile.column("compute_s"), [0] * 8, 4)
    assert stage_costs(plan, profile)[0].forward_s == 2
    with pytest.raises(ValueError, match="does not predict what its stages take"):
        stage_costs(plan)
    with pytest.raises(ValueError, match="8 layers, the profile 7"):
        stage_costs(plan, make_profile(7))


# ---------------------------------------------------------------- comparing


def named(comparison):
    return {outcome.name: outcome for outcome in comparison.outcomes}


def test_all_schedules_side_by_side():
    """Four equal stages of 2 + 4 s, microbatches of 10 examples, and links that take no time."""
    profile = make_profile(cut_bytes=0)
    comparison = compare(make_plan(profile, "4@1GB/s"), profile, num_microbatches=8)
    outcomes = named(comparison)
    assert list(outcomes) == list(ALGORITHMS)
    seconds = {name: outcome.minibatch_s for name, outcome in outcomes.items()}
    assert seconds == {
        "model_parallel": 8 * 4 * 6,
        "gpipe": (8 + 3) * 6,
        "one_f_one_b": (8 + 3) * 6,
        "interleaved": 8 * 6 + 3 * 3,
        "zero_bubble_h1": 8 * 6 + 3 * 2,
        "zero_bubble_v": 8 * 6,  # its minibatches overlap
        "pipedream": 8 * 6,  # one microbatch eight times as large
        "pipedream_vertical_sync": 8 * 6,
        "pipedream_2bw": 8 * 6,
    }
    for outcome in comparison.outcomes:
        share = 1 - 8 * 6 / outcome.minibatch_s
        assert outcome.bubble_share == pytest.approx(share, rel=1e-12, abs=1e-12)
    stale = {name: o.staleness for name, o in outcomes.items() if o.staleness}
    assert stale == {"pipedream": 3, "pipedream_vertical_sync": 3, "pipedream_2bw": 1}
    assert outcomes["interleaved"].note == "cut into 8 stages"
    # versions, gradients and Adam: 7 of 200 bytes; 4 in flight of 8 * 4000
    assert outcomes["pipedream"].peak_bytes == 7 * 200 + 4 * 8 * 4000
    assert outcomes["gpipe"].peak_bytes == 4 * 200 + 8 * 4000


def test_bytes_sent_for_a_minibatch():
    profile = make_profile()
    outcomes = named(compare(make_plan(profile), profile, num_microbatches=8))
    assert outcomes["gpipe"].sent_bytes == 3 * 2 * 8 * 1000
    assert outcomes["pipedream"].sent_bytes == 3 * 2 * 8 * 1000
    assert outcomes["interleaved"].sent_bytes == 7 * 2 * 8 * 1000
    assert outcomes["zero_bubble_v"].sent_bytes == 6 * 2 * 8 * 1000


def test_without_a_profile_the_model_divides_evenly():
    profile = make_profile()
    plan = make_plan(profile)
    one, other = (named(compare(plan, given)) for given in (profile, None))
    for name, outcome in one.items():
        assert other[name].minibatch_s == pytest.approx(outcome.minibatch_s, rel=1e-12)
        assert other[name].peak_bytes == outcome.peak_bytes
    assert other["interleaved"].note == "taken as 8 equal stages"


def test_replicas_where_a_schedule_has_them():
    profile = make_profile(cut_bytes=0, param_bytes=0)
    plan = make_plan(profile, num_stages=2)
    assert plan.notation == "3-1"
    outcomes = named(compare(plan, profile, num_microbatches=12))
    for name in ("one_f_one_b", "pipedream"):
        assert outcomes[name].note == ""
    for name in ("gpipe", "zero_bubble_h1", "pipedream_2bw", "pipedream_vertical_sync"):
        assert outcomes[name].note == "cut into 4 stages"
    assert outcomes["pipedream"].minibatch_s == 12 * 6
    assert outcomes["pipedream"].bubble_share == 0
    wide = make_profile(param_bytes=0)
    outcomes = named(compare(make_plan(wide, num_stages=2), wide, num_microbatches=12))
    assert outcomes["pipedream"].sent_bytes == outcomes["one_f_one_b"].sent_bytes == 2 * 12 * 1000


def test_replicas_of_a_nested_plan_stay_in_their_hosts():
    profile = make_profile(param_bytes=0)
    plan = make_plan(profile, "2x2@1GB/s,1kB/s", num_stages=2)
    assert [stage.workers for stage in plan.stages] == [(0, 2), (1, 3)]
    comparison = compare(plan, profile, schedules=["pipedream"])
    assert comparison.candidates[0].workers == (0, 2, 1, 3)
    whole = compare(make_plan(profile, "2x2@1GB/s,1kB/s", num_stages=1), profile)
    assert whole.candidates[-2].workers == (0, 2, 1, 3)
    (timeline,) = (each.timeline(comparison.topology) for each in comparison.candidates)
    assert {(t.source, t.target) for t in timeline.transfers} == {(0, 2), (2, 0), (1, 3), (3, 1)}


def test_tied_layers_stay_together_where_gradients_are_stale():
    profile = replace(make_profile(), tied=((3, 4),))
    comparison = compare(make_plan(profile, num_stages=2), profile, num_microbatches=12)
    costs = {each.name: each.costs for each in comparison.candidates}
    cuts = {name: [*accumulate(cost.forward_s for cost in each)] for name, each in costs.items()}
    assert cuts["gpipe"] == [2, 4, 6, 8]
    assert len(cuts["pipedream_2bw"]) == 4
    assert 4 not in cuts["pipedream_2bw"]


def test_the_memory_of_each_worker():
    profile = make_profile()
    plan = make_plan(profile)
    peak = 4 * 200 + 4 * 4000 + 2000
    assert named(compare(plan, profile))["one_f_one_b"].peak_bytes == peak
    for size, fits in ((peak, True), (peak - 1, False)):
        first = replace(Topology.parse("4@1GB/s"), memory_bytes=(size, *[10**9] * 3))
        assert named(compare(plan, profile, first))["one_f_one_b"].fits is fits


def test_the_fastest_that_fits_is_chosen():
    profile = make_profile()
    plan = make_plan(profile)
    outcomes = compare(plan, profile).outcomes
    assert choose(outcomes).name == "zero_bubble_v"
    assert choose(outcomes, allow_stale=True).name == "zero_bubble_v"  # as fast, and not stale
    others = [outcome for outcome in outcomes if outcome.name != "zero_bubble_v"]
    assert choose(others, allow_stale=True).name == "pipedream_2bw"
    small = Topology.parse("4@1GB/s:24kB")
    outcomes = compare(plan, profile, small).outcomes
    assert {o.name for o in outcomes if o.fits} == {
        o.name for o in outcomes if o.peak_bytes <= 24_000
    }
    assert not named(compare(plan, profile, small))["gpipe"].fits
    nothing = compare(plan, profile, Topology.parse("4@1GB/s:1kB")).outcomes
    with pytest.raises(ValueError, match=r"no synchronous schedule fits(.|\n)*does not fit"):
        choose(nothing)
    with pytest.raises(ValueError, match="no schedule fits"):
        choose(nothing, allow_stale=True)


def test_what_cannot_run_is_left_out_and_said():
    profile = make_profile(4)
    comparison = compare(make_plan(profile), profile, num_microbatches=2)
    left_out = dict(comparison.left_out)
    assert set(left_out) == {"interleaved", "zero_bubble_v", "pipedream_2bw"}
    assert "8 stages need at least as many layers" in left_out["interleaved"]
    assert "pipedream_2bw cannot run: pipedream_2bw with 4 stages" in str(comparison)


def test_a_schedule_of_ones_own():
    profile = make_profile()
    plan = make_plan(profile)
    own = replace(gpipe(4, 4), name="mine")
    outcome = compare(plan, profile, num_microbatches=8, schedules=[own]).outcomes[0]
    assert outcome.name == "mine"
    assert outcome.sent_bytes == 3 * 2 * 8 * 1000  # four microbatches of twice the size
    two = compare(plan, profile, schedules=[interleaved(4, 4)]).outcomes[0]
    assert two.note == ""  # the plan's four stages, on two workers
    broken = Schedule.parse("worker 0: 0F0 0B0")
    ((name, why),) = compare(plan, profile, schedules=[broken]).left_out
    assert (name, "no update" in why) == ("custom", True)


def test_the_table():
    profile = make_profile(forward_s=1e-3, backward_s=2e-3)
    plan = make_plan(profile, "4@1GB/s:32KiB")
    names = ["gpipe", "interleaved", "pipedream_2bw"]
    text = str(compare(plan, profile, num_microbatches=8, schedules=names))
    heading, _, *rows = text.splitlines()
    assert heading == "minibatches of 8 microbatches of 10 examples on 4@1GB/s:32KiB"
    assert [re.split(r"\s{2,}", row) for row in rows] == [
        ["schedule", "minibatch", "examples/s", "bubble", "peak", "sent/minibatch", "stale by"],
        ["gpipe", "66 ms", "1,212", "27.3%", "35.9 KiB", "46.9 KiB", "does not fit"],
        ["interleaved", "57 ms", "1,403", "15.8%", "26.2 KiB", "109.4 KiB", "cut into 8 stages"],
        ["pipedream_2bw", "48 ms", "1,666", "0.0%", "18.6 KiB", "46.9 KiB", "1"],
    ]
    unknown = replace(profile, batch_size=None)
    assert "examples" not in str(compare(plan, unknown, schedules=["gpipe"]))
    assert describe([]).startswith("schedule")


def test_by_default_there_are_four_microbatches_for_each_worker():
    profile = make_profile()
    assert compare(make_plan(profile), schedules=[]).num_microbatches == 16
    plan = make_plan(profile, schedule="gpipe", num_microbatches=5)
    assert compare(plan, schedules=[]).num_microbatches == 5


def test_timelines_of_candidates():
    profile = make_profile()
    plan = make_plan(profile)
    comparison = compare(plan, profile, num_microbatches=8)
    for candidate, outcome in zip(comparison.candidates, comparison.outcomes, strict=True):
        timeline = candidate.timeline(comparison.topology)
        assert timeline.title == candidate.name
        if not outcome.staleness:
            # under ZB-V some workers begin the next minibatch while others end this one
            overlaps = candidate.name == "zero_bubble_v"
            assert overlaps == (outcome.minibatch_s < 0.99 * timeline.makespan_s)
            if not overlaps:
                assert timeline.makespan_s == pytest.approx(outcome.minibatch_s, rel=1e-12)
                assert timeline.bubble_share == pytest.approx(outcome.bubble_share, rel=1e-9)
            assert sum(timeline.link_bytes.values()) == outcome.sent_bytes
    costs = comparison.candidates[2].costs
    makespan_s = simulate(one_f_one_b(4, 8), costs, comparison.topology).makespan_s
    assert makespan_s == pytest.approx(comparison.outcomes[2].minibatch_s, rel=1e-12)
