"""The short text form of topologies, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdjax.topology import Level, Topology, format_bytes

GIB = 2**30


def test_the_text_form_reads_from_the_inside_out():
    topology = Topology.parse("4x2@100Gbit/s,1.25GB/s:16GiB")
    assert topology.levels == (Level(4, 12.5e9), Level(2, 1.25e9))
    assert topology.memory_bytes == (16 * GIB,) * 8
    assert topology.num_workers == 8


def test_memory_may_differ_from_worker_to_worker():
    topology = Topology.parse("2x2@10GB/s,1GB/s:3*16GiB,8GiB")
    assert topology.memory_bytes == (16 * GIB,) * 3 + (8 * GIB,)
    assert Topology.parse("2@1MB/s").memory_bytes == ()


levels = st.lists(
    st.builds(Level, st.integers(1, 5), st.floats(1.0, 1e13).map(lambda x: float(f"{x:.9g}"))),
    min_size=1,
    max_size=3,
)


@given(levels, st.data())
def test_what_is_printed_reads_back(found, data):
    topology = Topology(tuple(found))
    sizes = data.draw(st.lists(st.integers(1, 2**44), min_size=1, max_size=3))
    count = topology.num_workers
    memory = data.draw(st.sampled_from([(), tuple(sizes[i % len(sizes)] for i in range(count))]))
    topology = Topology(topology.levels, memory)
    assert Topology.parse(str(topology)) == topology


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4x4", "gives no bandwidth"),
        ("4x4@10GB/s", "2 levels but 1 bandwidths"),
        ("4xtwo@1GB/s,1GB/s", "'two' is not a number of units"),
        ("4@10GB", "not a bandwidth"),
        ("4@10parsec/s", "not a bandwidth"),
        ("4@0GB/s", "positive"),
        ("0@1GB/s", "at least 1"),
        ("4@1GB/s:lots", "not a size"),
        ("4@1GB/s:16GiB,8GiB", "2 workers of 4"),
        ("4@1.2.3GB/s", "not a number"),
    ],
)
def test_what_is_no_topology(text, message):
    with pytest.raises(ValueError, match=message):
        Topology.parse(text)


def test_sizes_for_people():
    assert format_bytes(11.3 * GIB) == "11.3 GiB"
    assert format_bytes(512) == "512 B"
