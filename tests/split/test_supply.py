"""Every stage has what it wants, and nothing runs or travels without need."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from random_equations import NUM_INPUTS, program, rows, some

from pdjax.split.supply import Supply
from pdjax.trace.dataflow import DataFlow


def test_three_stages():
    """The example of the docstring: a on stage 0, b = g(a) on 1, c = f(a, b) on 2."""
    values, equations = program([([0], 1), ([3], 1), ([3, 4], 1)])
    x, (a, b, c) = values[0], values[NUM_INPUTS:]
    home = {x: 0, a: 0, b: 1, c: 2}
    supply = Supply(DataFlow(equations), 3, lambda var, stage: home[var])
    supply.add([(c, 2)])
    assert supply.run == [{0}, {1}, {2}]
    assert supply.inputs == [{x}, set(), set()]
    sent = {var: (transfer.source, transfer.targets) for var, transfer in supply.transfers.items()}
    assert sent == {a: (0, {1, 2}), b: (1, {2})}


@settings(max_examples=200, deadline=None)
@given(
    rows,
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 2)), max_size=4),
    st.lists(st.sets(st.integers(0, 2)), min_size=40, max_size=40),
)
def test_every_demand_is_met(choices, wanted, places):
    """`places` are the stages that may compute a value; with none, every stage may."""
    values, equations = program(choices)
    number = {var: at for at, var in enumerate(values)}
    flow = DataFlow(equations)

    def source(var, stage):
        allowed = places[number[var]] or {stage}
        return stage if stage in allowed else min(allowed)

    supply = Supply(flow, 3, source)
    demands = [(some(values, [at])[0], stage) for at, stage in wanted]
    for demand in demands:
        supply.add([demand])

    made = [{v for at in run for v in equations[at].outvars} for run in supply.run]
    received = [{v for v, t in supply.transfers.items() if s in t.targets} for s in range(3)]
    there = [made[s] | supply.inputs[s] | received[s] for s in range(3)]
    needs = [(v, s) for s in range(3) for at in supply.run[s] for v in flow.inputs[at]]
    needs += [(v, t.source) for v, t in supply.transfers.items()]
    assert all(var in there[stage] for var, stage in [*demands, *needs])

    asked = {*demands, *needs}
    for stage in range(3):
        results = [set(equations[at].outvars) for at in supply.run[stage]]
        assert all(any((v, stage) in asked for v in group) for group in results)
        assert all((var, stage) in asked for var in supply.inputs[stage] | received[stage])
        assert not received[stage] & {v for v in values if source(v, stage) == stage}
