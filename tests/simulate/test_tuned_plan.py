"""Slack and update lag of plans, chosen by simulation."""

from __future__ import annotations

import dataclasses

import pytest

from pdjax.plan import Plan, PlanOptions, search_plan
from pdjax.profile import LayerProfile, Profile
from pdjax.simulate import compare, plan_pipeline
from pdjax.topology import Topology

EVEN = Profile(
    tuple(LayerProfile(f"block_{i}", 1e-3, 2e-3, 4e5, 8e6) for i in range(8)), batch_size=4
)
SMALL_WEIGHTS = Profile(
    tuple(LayerProfile(f"block_{i}", 1e-3, 2e-3, 4e5, 8e3) for i in range(3)), batch_size=4
)
FAST, SLOW = Topology.parse("4@1000GB/s"), Topology.parse("4@1GB/s")


def simulated(plan: Plan, profile: Profile, **options) -> float:
    """Seconds for each minibatch, as the comparison of schedules has it."""
    assert plan.prediction is not None
    name, count = plan.prediction.schedule, plan.prediction.num_microbatches
    comparison = compare(plan, profile, num_microbatches=count, schedules=[name], **options)
    return comparison.outcomes[0].minibatch_s


@pytest.mark.parametrize(("schedule", "count"), [("pipedream", 1), ("one_f_one_b", 16)])
@pytest.mark.parametrize("topology", [FAST, SLOW, Topology.parse("2x4@10GB/s,0.5GB/s")])
def test_a_plan_promises_what_its_simulation_takes(schedule, count, topology):
    plan = plan_pipeline(EVEN, topology, PlanOptions(schedule, count))
    assert plan.prediction is not None
    assert plan.prediction.minibatch_s == pytest.approx(simulated(plan, EVEN))
    assert plan.prediction.limit_s is not None
    assert plan.prediction.limit_s <= plan.prediction.minibatch_s * 1.001


def test_slack_is_taken_where_transfers_would_be_waited_for():
    assert plan_pipeline(EVEN, FAST).slack == 0
    plan = plan_pipeline(EVEN, SLOW)
    assert plan.slack == 1
    tight = plan_pipeline(EVEN, SLOW, PlanOptions(slack=0))
    assert plan.prediction is not None
    assert tight.prediction is not None
    assert plan.prediction.minibatch_s < tight.prediction.minibatch_s / 1.01
    assert "Run it with slack 1." in str(plan)


def test_slack_is_charged():
    plan, tight = (plan_pipeline(EVEN, SLOW, PlanOptions(slack=slack)) for slack in (1, 0))
    assert plan.first_layers == tight.first_layers
    assert [stage.warm_up for stage in tight.stages] == [3, 2, 1, 0]
    assert [stage.warm_up for stage in plan.stages] == [6, 4, 2, 0]
    one_version = plan.stages[0].param_bytes
    more = plan.stages[0].peak_bytes - tight.stages[0].peak_bytes
    assert more == pytest.approx(3 * one_version)


def test_slack_that_does_not_fit_is_not_chosen():
    peak = max(s.peak_bytes for s in plan_pipeline(EVEN, SLOW, PlanOptions(slack=0)).stages)
    limited = dataclasses.replace(SLOW, memory_bytes=(int(peak) + 1,) * 4)
    assert plan_pipeline(EVEN, limited).slack == 0
    with pytest.raises(ValueError, match=r"does not fit into memory with slack=1"):
        plan_pipeline(EVEN, limited, PlanOptions(num_stages=4, replicate=False, slack=1))


def test_updates_are_late_where_an_all_reduce_is_waited_for():
    heavy = Profile(
        tuple(LayerProfile(f"block_{i}", 1e-3, 2e-3, 4e9, 1.5e6) for i in range(4)), batch_size=4
    )
    plan = plan_pipeline(heavy, SLOW)
    now = plan_pipeline(heavy, SLOW, PlanOptions(update_lag=0))
    assert max(plan.replicas) > 1
    assert (plan.update_lag, now.update_lag) == (1, 0)
    assert plan.prediction is not None
    assert now.prediction is not None
    assert plan.prediction.minibatch_s < now.prediction.minibatch_s / 1.01


def test_options_that_a_schedule_has_not():
    with pytest.raises(ValueError, match=r"slack=1, but this schedule has no slack.*one_f_one_b"):
        plan_pipeline(EVEN, FAST, PlanOptions("gpipe", 8, slack=1))
    with pytest.raises(ValueError, match=r"update_lag=1, but this schedule has no update_lag"):
        plan_pipeline(EVEN, FAST, PlanOptions("one_f_one_b", 8, update_lag=1))
    with pytest.raises(ValueError, match=r"slack=-1; expected"):
        PlanOptions(slack=-1)


def test_a_plan_keeps_its_options_in_its_file(tmp_path):
    plan = plan_pipeline(EVEN, SLOW)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(ValueError, match="slack is -1"):
        dataclasses.replace(plan, slack=-1)


def test_other_schedules_of_a_plan_have_no_slack_unless_it_is_chosen():
    plan = plan_pipeline(EVEN, SLOW)
    names = ["pipedream", "one_f_one_b", "gpipe"]
    given = compare(plan, EVEN, num_microbatches=16, schedules=names)
    assert [candidate.slack for candidate in given.candidates] == [1, 0, 0]
    chosen = compare(plan, EVEN, num_microbatches=16, schedules=names, choose_options=True)
    assert [candidate.slack for candidate in chosen.candidates] == [1, 1, 0]
    assert chosen.outcomes[1].minibatch_s < given.outcomes[1].minibatch_s
    assert chosen.outcomes[1].note == "slack 1"


def test_a_plan_that_takes_too_long_to_simulate_keeps_its_limit():
    many = Topology.parse("64x16@10GB/s,1GB/s")
    plan = plan_pipeline(EVEN, many)
    if plan.prediction is not None and plan.prediction.limit_s is None:
        steady = search_plan(EVEN, many)
        assert steady.prediction is not None
        assert plan.prediction.minibatch_s == steady.prediction.minibatch_s
