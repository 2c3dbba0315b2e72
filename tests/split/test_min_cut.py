"""The smallest stash, against every other choice."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st

from pdjax.split.min_cut import smallest_stash
from pdjax.trace import dataflow, inline, jaxprs

_PER_VALUE_BYTES = 64


def random_program(choices):
    """A few values, each made of one or two earlier ones, of different sizes."""
    sizes = [1, 4, 16, 64]

    def function(a, b):
        values = [a, b]
        for first, second, size in choices:
            x, y = values[first % len(values)], values[second % len(values)]
            values.append(jnp.resize(x, (sizes[size],)) + jnp.resize(y, (sizes[size],)))
        return values

    return inline.trace(function, jnp.ones(4), jnp.ones(16))[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3)), max_size=3),
    st.data(),
)
def test_no_choice_is_smaller(choices, data):
    program = random_program(choices)
    equations = program.equations
    made = [var for equation in equations for var in equation.outvars]
    frozen = (
        set(data.draw(st.lists(st.sampled_from(range(len(equations))), max_size=4)))
        if made
        else set()
    )
    again = {id(e) for i, e in enumerate(equations) if i not in frozen}
    at_hand, received = program.invars[:1], program.invars[1:]
    everything = [*received, *made][:12]
    residuals = data.draw(st.lists(st.sampled_from(everything), unique=True, max_size=3))

    def possible(saved):
        missing = dataflow.needed(equations, residuals, [*at_hand, *saved])
        kept = [equations[i] for i in missing]
        reads = dataflow.free_variables(kept, residuals)
        return all(id(e) in again for e in kept) and set(reads) <= {*at_hand, *saved}

    def cost(saved):
        return sum(jaxprs.num_bytes(var) + _PER_VALUE_BYTES for var in saved)

    chosen = smallest_stash(equations, at_hand, received, residuals, lambda e: id(e) in again)
    assert possible(chosen)
    others = (
        subset
        for count in range(len(chosen) + 2)
        for subset in itertools.combinations([*received, *made], count)
        if cost(subset) < cost(chosen)
    )
    assert not any(map(possible, others))
