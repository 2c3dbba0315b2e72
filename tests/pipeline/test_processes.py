"""In several processes a pipeline does what it does in one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainings
import zoo

import pdjax
from pdjax.communication import p2p
from pdjax.runtime.gather import Gather
from pdjax.runtime.replica_map import ReplicaMap
from pdjax.topology import measure
from pdjax.topology.topology import Level

PROGRAMS = Path(__file__).parents[1] / "helpers" / "programs"
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": os.environ["PDJAX_TEST_CACHE"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


@pytest.fixture
def compiled_as_in_programs() -> Iterator[None]:
    """In float64, and compiled quickly: in several processes everything is compiled anew."""
    with jax.enable_x64(True), zoo.compiled_quickly():
        yield


def launch(program: str, num_processes: int, *arguments: str) -> tuple[int, str]:
    """Runs one of `tests/helpers/programs` in several processes; returns exit code and output."""
    options = ["--num-processes", str(num_processes), "--no-pin", "--grace-s", "5", "--"]
    command = [sys.executable, str(PROGRAMS / program), *arguments]
    with subprocess.Popen(
        [sys.executable, "-m", "pdjax.launch", *options, *command],
        env=os.environ | CACHE | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        try:
            output, _ = launcher.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends the others, too
            output, _ = launcher.communicate()
            pytest.fail(f"{program} hangs:\n{output}")
    return launcher.returncode, output


@pytest.mark.parametrize(
    ("name", "wire"), [*((name, "transfer") for name in trainings.GROUPS), ("mixed", "device_put")]
)
def test_several_processes_compute_what_one_computes(
    name, wire, tmp_path, compiled_as_in_programs, monkeypatch
):
    """To the last bit: losses, metrics, parameters, state; in every process, whatever it runs."""
    monkeypatch.setenv(p2p.VARIABLE, wire)
    by_put = ["put"] if wire == "device_put" else []
    group = trainings.GROUPS[name]
    expected = {name: trainings.run(training) for name, training in group.trainings.items()}
    code, output = launch("train.py", group.num_processes, name, str(tmp_path), *by_put)
    assert code == 0, output
    for training, in_one in expected.items():
        found = [
            dict(np.load(tmp_path / f"{training}-{process}.npz"))
            for process in range(group.num_processes)
        ]
        for in_process in found:
            _compare(training, in_process, in_one, exact=group.trainings[training].exact)
        for key in in_one:
            if key.startswith("own"):
                together = sum(in_process[key] for in_process in found)
                np.testing.assert_array_equal(together, in_one[key], f"{training}: {key}")


def _compare(training, found, expected, *, exact):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.startswith(("own", "compiled")):
            continue
        if exact:
            np.testing.assert_array_equal(found[key], value, f"{training}: {key}")
        else:
            chex.assert_trees_all_close(found[key], value, rtol=1e-12, atol=1e-14)
    assert found["compiled first"] <= 4, training  # copies of the batch and the like
    assert found["compiled again"] == 0, training


def test_every_stage_makes_its_own_parameters(tmp_path, compiled_as_in_programs):
    """And no device ever holds more; the numbers are those of the function, to the last bit."""
    with jax.enable_x64(False):
        expected = trainings.run_made("arrays")
        in_one = trainings.run_made("functions")
    code, output = launch("make.py", 2, str(tmp_path))
    assert code == 0, output
    in_two = [dict(np.load(tmp_path / f"{process}.npz")) for process in range(2)]
    for found in (in_one, *in_two):
        for key, value in expected.items():
            if not key.startswith("own"):
                np.testing.assert_array_equal(found[key], value, key)
    for stage in range(2):
        assert f"own/held {1 - stage}" not in in_two[stage]
        for found in (in_one, in_two[stage]):
            weights, held = found[f"own/weights {stage}"], found[f"own/held {stage}"]
            assert weights > 30_000
            assert 2 * weights <= held < 2 * weights + 8_000  # less than half of a layer more
            assert found[f"own/made {stage}"] < weights + 8_000


def test_trouble_is_the_same_in_all_processes(tmp_path):
    """What differs has a name in all of them, and whatever goes wrong nobody waits for ever."""
    code, output = launch("trouble.py", 2, str(tmp_path))
    assert code == 1
    assert "[1] KeyError: 'a mistake'" in output, output
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2))
    assert first["disagreements"] == second["disagreements"]
    for name, text in first["disagreements"].items():
        has = r"process {} on \S+ has .+".format
        assert re.match(f"the processes disagree about {name}: {has(0)}, {has(1)}. Start", text)
    for said in (first, second):
        assert said["too many stages"].startswith("3 stages need as many devices, but there are 2")
    assert first["devices of process 0"] is None
    assert "are in process 0" in second["devices of process 0"]
    for said, mine in ((first, "x"), (second, "y")):
        assert said["reads"] == {"x": mine == "x", "y": mine == "y"}
        for call in ("step", "evaluate"):
            assert f"only the shape of ['{mine}'], which a stage of this" in said[f"{call} shapes"]
        assert said["nonfinite"] == 3
        assert said["cuts"] == [0, 1]
        assert said["replicas"] == [2]
        assert "step 0 failed with JaxRuntimeError" in said["sizes"]
    assert first["loss"] == second["loss"]


def test_what_is_sent_does_not_wait_for_what_its_sender_computes(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "1")  # threads that compute
    code, output = launch("busy.py", 2)
    assert code == 0, output


def test_all_are_ready_when_init_returns(tmp_path):
    """Or the time that the slowest takes to compile would be counted as that of the first step."""
    code, output = launch("ready.py", 2, str(tmp_path / "mark"))
    assert code == 0, output


@pytest.mark.parametrize("first", ["knows", "waits"])
def test_one_ends_before_the_other(first):
    """The other would wait for it for ever: it says so, before a step or out of one."""
    code, output = launch("uneven.py", 2, first)
    assert code in {1, 3}, output  # of the one that ended first
    text = r"process 1 \(\S+, pid \d+\), stage 1: block_1, has ended after 2 calls of Pipeline.step"
    begins = r"\[0\] pdjax\S+ClusterError: " if first == "knows" else r"\[0\] error: "
    assert re.search(rf"^{begins}{text}, while process 0 is at call \d+;", output, re.M), output


@pytest.mark.parametrize(
    ("owners", "memory", "expected"),
    [
        ([0, 1], [[8], [9]], "2@5MB/s:1*8B,1*9B"),
        ([0, 0, 1, 1], [[8, 8], [8, 8]], "2x2@20MB/s,5MB/s:8B"),
        ([1, 0, 1, 0], [[4, 5], [6, 7]], "4@5MB/s:1*6B,1*4B,1*7B,1*5B"),
        ([0, 0, 1], [[8, 8], []], "3@5MB/s"),
        ([1, 1], [None, [8, 8]], "2x1@20MB/s,5MB/s:8B"),
    ],
)
def test_topology_of_several_processes(owners, memory, expected, monkeypatch):
    """The slowest links count; of devices that take turns in processes nothing nearer is known."""

    class Both:
        def exchange(self, about, mine):
            other = {"between": 5e6, "within": 20e6, "memory": memory[1]}
            assert mine["between"] == 7e6
            assert ("memory" in mine) == (0 in owners)
            return [mine, other if 1 in owners else {"between": 5e6}]

    def local_topology(devices):
        assert [device.process_index for device in devices] == [0] * owners.count(0)
        return pdjax.Topology((Level(len(devices), 30e6),), tuple(memory[0]))

    monkeypatch.setattr(measure, "measure_between_processes", lambda *_: 7e6)
    monkeypatch.setattr(measure, "local_topology", local_topology)
    devices = [SimpleNamespace(process_index=owner) for owner in owners]
    peers: Any = Both()
    assert str(measure.joint_topology(devices, peers)) == expected


def test_what_is_sent_to_be_evaluated_is_a_copy():
    """A step may donate what is held before it has arrived."""

    class Elsewhere:
        is_local = (True, False)

        def send_recv(self, values, shapes, source, target):
            self.moved = [value.unsafe_buffer_pointer() for value in values]
            assert (shapes, source, target) == (["shape"], 0, 1)

    held, transport = jnp.arange(3.0), Elsewhere()
    run = SimpleNamespace(stages=[SimpleNamespace(lasting=None)] * 2)
    given: Any = ReplicaMap((0, 1), (0, 1)), [(0,)], ["shape"], lambda *_: held, transport
    assert Gather(*given).at(cast(Any, run), 0, 1) is None
    assert transport.moved != [held.unsafe_buffer_pointer()]
    assert not held.is_deleted()
