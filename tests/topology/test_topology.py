"""The short text form of topologies, what is refused, and the machine at hand."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdjax import bandwidth, cache
from pdjax.topology import bandwidth as links
from pdjax.topology import measure
from pdjax.topology.measure import local_topology
from pdjax.topology.topology import Level, Topology
from pdjax.units import format_bytes

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


def test_the_local_devices_are_the_workers(monkeypatch, cache_directory):
    cache.forget()
    monkeypatch.setattr(measure, "measure_bandwidth", lambda devices: 1e9 * len(devices))
    assert local_topology(jax.devices()[:4]) == Topology.uniform(4, 4e9)
    assert local_topology() == local_topology(jax.devices())
    assert local_topology(jax.devices()[:2]) == Topology.uniform(2, 2e9)
    assert local_topology(jax.devices()[:2], bandwidth_bytes_per_s=5.0).levels[0] == Level(2, 5.0)


def gpu(memory_bytes):
    stats = {"bytes_limit": memory_bytes, "bytes_in_use": 1} if memory_bytes else {}
    return SimpleNamespace(memory_stats=lambda: stats)


def test_memory_is_what_the_devices_say():
    local = local_topology([gpu(16 * GIB), gpu(8 * GIB)], bandwidth_bytes_per_s=1e9)
    assert local.memory_bytes == (16 * GIB, 8 * GIB)
    unknown = local_topology([gpu(16 * GIB), gpu(None)], bandwidth_bytes_per_s=1e9)
    assert unknown.memory_bytes == ()


def test_bandwidth_is_bytes_over_seconds_without_the_first_turn(monkeypatch):
    """The clock is made up: the transfers of the six pairs take 1 s, 2 s … 6 s, the first 60 s."""
    times = []
    for number, pair in enumerate([*range(1, 7)] * 2):
        start = times[-1] if times else 0.0
        times += [start, start + (60.0 if number < 6 else float(pair))]
    clock = iter(times)
    monkeypatch.setattr(links.time, "perf_counter", lambda: next(clock))
    rates = links.measure_pairs(jax.devices()[:3], num_bytes=60, repeats=1)
    assert rates == {
        (0, 1): 60.0,
        (0, 2): 30.0,
        (1, 0): 20.0,
        (1, 2): 15.0,
        (2, 0): 12.0,
        (2, 1): 10.0,
    }
    clock = iter(times)
    assert links.measure_bandwidth(jax.devices()[:3], 60, 1) == 17.5


@pytest.mark.parametrize(("count", "order"), [(2, [(0, 1), (1, 0)]), (3, [(0, 1), (2, 0), (1, 2)])])
def test_processes_send_around_a_ring_and_the_slowest_counts(count, order, monkeypatch):
    """All in one order, so that no two wait for each other, and none begins before all are ready.

    The clock is made up: a turn takes 2 s, the first 60 s.
    """

    class Ring:
        is_local = (True,) + (False,) * (count - 1)

        def __init__(self, places, peers):
            assert (len(places), peers.process_id) == (count, 0)

        def barrier(self):
            log.append("meet")

        def send_recv(self, values, shapes, source, target):
            assert (values is None) == (source != 0)
            assert [(s.shape, s.dtype) for s in shapes] == [((60,), "uint8")]
            log.append((source, target))
            return shapes if target == 0 else None

    def exchange(about, seconds):
        assert seconds == 2.0
        return [seconds, 3.0, *[1.0] * (count - 2)]

    log: list[Any] = []
    clock = iter([0.0, 60.0, 60.0, 62.0, 62.0, 64.0])
    elsewhere = [SimpleNamespace(process_index=process) for process in range(1, count)]
    monkeypatch.setattr(links, "RemoteTransport", Ring)
    monkeypatch.setattr(links.time, "perf_counter", lambda: next(clock))
    here = jax.devices()[0]
    monkeypatch.setattr(links.jax, "devices", lambda: [here, *elsewhere])
    monkeypatch.setattr(links, "SingleDeviceSharding", lambda device: device)
    peers: Any = SimpleNamespace(num_processes=count, process_id=0, exchange=exchange)
    assert links.measure_between_processes(peers, 60, 2) == 20.0
    assert log == ["meet", *order] * 3


def test_bandwidth_of_too_few_devices():
    assert links.measure_bandwidth(jax.devices()[:1]) == links.ALONE_BYTES_PER_S
    with pytest.raises(ValueError, match="no devices"):
        links.measure_bandwidth([])
    with pytest.raises(ValueError, match="no devices"):
        local_topology([])
    with pytest.raises(ValueError, match="there is one process"):
        links.measure_between_processes(cast(Any, SimpleNamespace(num_processes=1)))
    with pytest.raises(ValueError, match="belongs to process 7, this is process 0"):
        links.measure_bandwidth([SimpleNamespace(process_index=7)])


def test_the_command_prints_a_table_and_a_topology(capsys):
    assert bandwidth.main(["--num-bytes", "64", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    count = len(jax.devices())
    assert len(re.findall(r"B/s", printed)) == count * (count - 1) + 1
    (text,) = re.findall(r"--topology (.*)", printed)
    assert Topology.parse(text).num_workers == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator", "localhost:1"], "--coordinator, --num-processes and"),
        (["--num-bytes", "0"], "--num-bytes 0: expected at least 1"),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id 2: expected 0 to 1",
        ),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    assert bandwidth.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_measures_between_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "pdjax.bandwidth", "--coordinator", address]
    command += ["--num-processes", "2", "--num-devices", "2", "--num-bytes", "4096"]
    running = [
        subprocess.Popen(
            [*command, "--process-id", str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], printed
    assert all("between processes:" in text for text in printed)
    (text,) = re.findall(r"--topology (.*)", "".join(printed))
    assert [level.num_units for level in Topology.parse(text).levels] == [2, 2]
