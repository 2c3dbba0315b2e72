"""Plans against brute force, and what is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdjax import Plan
from pdjax.plan import balanced_plan, manual_plan

layers = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), min_size=1, max_size=8)


@given(layers, st.data())
def test_balanced_plan_is_the_narrowest_within_the_slack_of_the_best(values, data):
    work, cut_bytes = zip(*values, strict=True)
    count = len(values)
    num_stages = data.draw(st.integers(1, count))
    plan = balanced_plan([str(i) for i in range(count)], work, cut_bytes, num_stages)

    def busiest(starts):
        bounds = [*starts, count]
        return max(sum(work[a:b]) for a, b in itertools.pairwise(bounds))

    def sent(starts):
        return sum(cut_bytes[at - 1] for at in starts[1:])

    every = [(0, *cuts) for cuts in itertools.combinations(range(1, count), num_stages - 1)]
    best = min(map(busiest, every))
    allowed = [starts for starts in every if busiest(starts) <= best * 1.0999 + 1e-9]
    assert busiest(plan.first_layers) <= best * 1.1001 + 1e-9
    assert sent(plan.first_layers) <= min(map(sent, allowed))


NAMES = ("embed", "block_0/dense", "block_0/out", "block_1/dense", "head")


def test_cuts_by_name_of_layer_or_module():
    plan = manual_plan(NAMES, [1, 1, 1, 1, 1], ["block_0", "head"])
    assert plan.first_layers == (0, 1, 4)
    assert plan.stage_layers(1) == NAMES[1:4]
    assert plan.shares == (0.2, 0.6, 0.2)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (["block_2"], "Did you mean 'block"),
        (["head", "block_0"], "in the model's order"),
        (["embed"], "none at its first layer"),
    ],
)
def test_cuts_that_make_no_sense(cuts, message):
    with pytest.raises(ValueError, match=message):
        manual_plan(NAMES, [1.0] * 5, cuts)


def test_fewer_layers_than_stages():
    with pytest.raises(ValueError, match="num_stages=5 or fewer"):
        balanced_plan(NAMES, [1.0] * 5, [0] * 5, 6)


def test_json_and_text():
    plan = manual_plan(NAMES, [1, 1, 1, 1, 1], ["block_1"])
    assert Plan.from_json(plan.to_json()) == plan
    assert "stage 1:   2 layers" in str(plan)


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (0, 5), (0, 3, 2)])
def test_plans_that_make_no_sense(starts):
    with pytest.raises(ValueError, match="expected ascending"):
        Plan(NAMES, starts)


def test_the_same_cuts_in_another_line_of_layers():
    """What an evaluation lacks (dropout) or has besides does not move the other layers."""
    plan = Plan(NAMES, (0, 2, 4))
    assert plan.first_layers_in(NAMES) == (0, 2, 4)
    assert plan.first_layers_in(("embed", "block_0/dense", "block_1/dense", "head")) == (0, 2, 3)
    assert plan.first_layers_in(("embed", "new", "head")) == (0, 2, 2)
    assert plan.first_layers_in(("embed",)) == (0, 1, 1)
