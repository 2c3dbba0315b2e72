"""Parameters that are ranges of leaves: their names, and the way to and from whole leaves."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from pdjax.trace.leaf_range import LeafRange, join, whole_leaves


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2), st.sets(st.integers(1, 5)), st.booleans())
def test_ranges_of_a_leaf_join_to_the_leaf(axis, cuts, on_device):
    leaves = [np.arange(3.0), np.arange(216.0).reshape(6, 6, 6), np.zeros(())]
    if on_device:
        leaves = list(map(jnp.asarray, leaves))
    bounds = [0, *sorted(cuts), 6]
    parts = [LeafRange(1, axis, a, b) for a, b in itertools.pairwise(bounds)]
    ranges = [LeafRange(0), *parts, LeafRange(2)]
    values = [part.of(leaves[part.leaf]) for part in ranges]
    for part, value in zip(parts, values[1:-1], strict=True):
        assert part.stop is not None
        assert value.shape == tuple(part.stop - part.start if at == axis else 6 for at in range(3))
    joined = join(ranges, values)
    assert all(map(np.array_equal, joined, leaves))
    assert all(type(new) is type(old) for new, old in zip(joined, leaves, strict=True))


def test_a_whole_leaf_is_handed_through_untouched():
    leaves = [np.ones(2), jax.random.key(0), 3.0]
    ranges = whole_leaves(3)
    values = [part.of(leaf) for part, leaf in zip(ranges, leaves, strict=True)]
    assert all(map(lambda a, b: a is b, join(ranges, values), leaves))
    assert all(part.is_whole for part in ranges)
    assert not LeafRange(0, 0, 0, 1).is_whole


def test_a_range_of_a_host_array_copies_nothing():
    leaf = np.zeros((4, 2))
    assert np.shares_memory(LeafRange(0, 0, 1, 3).of(leaf), leaf)


def test_names():
    assert LeafRange(0).name("blocks/w") == "blocks/w"
    assert LeafRange(0, 0, 3, 7).name("blocks/w") == "blocks/w[3:7]"
    assert LeafRange(0, 1, 3, 7).name("blocks/w") == "blocks/w[:, 3:7]"


@pytest.mark.parametrize(
    "arguments", [(None, 1, None), (None, 0, 2), (0, 0, None), (0, 2, 2), (0, -1, 2)]
)
def test_ranges_that_make_no_sense(arguments):
    with pytest.raises(ValueError, match=r"leaf 3 along axis .* expected an axis and a range"):
        LeafRange(3, *arguments)


@pytest.mark.parametrize(
    "ranges",
    [
        [LeafRange(0, 0, 0, 2), LeafRange(0, 0, 3, 4)],
        [LeafRange(0, 0, 2, 4), LeafRange(0, 0, 0, 2)],
        [LeafRange(0, 0, 1, 4)],
        [LeafRange(0), LeafRange(0)],
        [LeafRange(0, 0, 0, 2), LeafRange(0)],
        [LeafRange(0), LeafRange(0, 0, 0, 2)],
        [LeafRange(0, 0, 0, 2), LeafRange(0, 1, 2, 4)],
    ],
)
def test_ranges_with_gaps_are_refused(ranges):
    leaf = np.zeros((4, 4))
    with pytest.raises(ValueError, match="does not begin at"):
        join(ranges, [part.of(leaf) for part in ranges])


def test_every_parameter_of_a_model_is_a_whole_leaf():
    case = zoo.dense_blocks(2)
    traced = zoo.graph_of(case, 2, jax.random.key(0)).traced
    leaves = jax.tree.leaves(case.params)
    assert traced.param_ranges == whole_leaves(len(leaves))
    assert traced.param_names == ("block_0/b", "block_0/w", "block_1/b", "block_1/w")
