"""Real processes that end in all sorts of ways: most without JAX, so that they start at once."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

import pdjax
from pdjax.launch import free_port

WAIT_S = 30.0  # for what should be done at once, on a machine that may be busy

# Without the rest of pdjax, and what that imports, they start several times as fast.
ALONE = f"""
import ctypes, os, signal, sys, time, types
root = types.ModuleType("pdjax")
root.__path__ = {list(pdjax.__path__)!r}
sys.modules["pdjax"] = root
"""

WITHOUT_JAX = (
    ALONE
    + f"""
from pdjax.distributed import options, startup
from pdjax.distributed.rendezvous_client import RendezvousClient
from pdjax.distributed.rendezvous_server import RendezvousServer
known = options.given_or_environment(None, None, None)
number = known[2]
peers = startup.meet(
    options.StartOptions(*known, float(os.environ["LOST_S"])),
    RendezvousClient if number else RendezvousServer,
    time.monotonic() + {WAIT_S},
)

def block():
    "The main thread waits in C, whatever signals come."
    mutex = ctypes.create_string_buffer(256)
    os.write(1, b"blocked\\n")
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
)

WITH_JAX = (
    ALONE
    + """
import jax
import numpy as np
import pdjax.distributed
number = int(os.environ["PDJAX_PROCESS_ID"])
"""
)

READY = """
peers.describe(f"stage {number}: block_{number} … head")
peers.completed(7)
peers.exchange("ready", True)
print("ready", flush=True)
"""


class Cluster:
    """Processes that run one program."""

    def __init__(self, program: str, num_processes: int, lost_s: float) -> None:
        given = {
            "PDJAX_COORDINATOR": f"127.0.0.1:{free_port()}",
            "PDJAX_NUM_PROCESSES": str(num_processes),
            "LOST_S": str(lost_s),
            "JAX_PLATFORMS": "cpu",
            "PYTHONUNBUFFERED": "",
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                env=os.environ | given | {"PDJAX_PROCESS_ID": str(number)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(num_processes)
        ]

    def wait_until_ready(self) -> None:
        for process in self.processes:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line == "ready\n", line + process.stderr.read()

    def wait_for(self, number: int, line: str) -> None:
        stdout = self.processes[number].stdout
        assert stdout is not None
        assert stdout.readline() == line + "\n"

    def send(self, number: int, what: signal.Signals) -> float:
        self.processes[number].send_signal(what)
        return time.monotonic()

    def outcome(self, number: int) -> tuple[int, str]:
        """Exit code, and what was written on standard error."""
        process = self.processes[number]
        text = process.communicate(timeout=WAIT_S)[1]
        return process.returncode, text


@contextlib.contextmanager
def cluster(program: str, num_processes: int = 2, lost_s: float = 20.0) -> Iterator[Cluster]:
    made = Cluster(program, num_processes, lost_s)
    try:
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.communicate()


def program(scenario: str) -> str:
    return WITHOUT_JAX + READY + scenario


# --- a process is lost


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_killed(lost):
    with cluster(program("block()"), 3) as run:
        run.wait_until_ready()
        killed_at = run.send(lost, signal.SIGKILL)
        for number in {0, 1, 2} - {lost}:
            code, text = run.outcome(number)
            assert code == 1
            assert re.fullmatch(
                rf"error: process {lost} \(\S+, pid {run.processes[lost].pid}\), "
                rf"stage {lost}: block_{lost} … head, was killed or crashed: .*"
                rf"It had completed 7 minibatches; this process {number} .*\n",
                text,
            )
        assert time.monotonic() - killed_at < 5


@pytest.mark.parametrize("lost", [0, 1])
def test_stopped(lost):
    """The others end in time, and so does the stopped one once it goes on."""
    with cluster(program("block()"), 3, lost_s=4.0) as run:
        run.wait_until_ready()
        stopped_at = run.send(lost, signal.SIGSTOP)
        for number in {0, 1, 2} - {lost}:
            code, text = run.outcome(number)
            assert code == 1
            assert f"error: process {lost} " in text
            assert "it hangs or is stopped" in text
        assert 2.0 < time.monotonic() - stopped_at < 4.0
        run.send(lost, signal.SIGCONT)
        code, text = run.outcome(lost)
        assert code == 1
        assert f"error: this process {lost} " in text
        assert "was given up by process" in text


def test_stopped_for_a_while_only():
    """Whoever slept does not blame the others."""
    scenario = "time.sleep(2.5); peers.exchange('still here', 1)"
    with cluster(program(scenario), 3, lost_s=2.0) as run:
        run.wait_until_ready()
        for number in range(3):
            run.send(number, signal.SIGSTOP)
        time.sleep(2.0)
        for number in range(3):
            run.send(number, signal.SIGCONT)
        assert [run.outcome(number) for number in range(3)] == [(0, "")] * 3


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="nothing says who is stopped")
def test_one_that_runs_no_python_for_a_while_is_not_lost():
    """A call in C that keeps the interpreter lock; then it is stopped, and that is noticed."""
    scenario = """
if number: ctypes.PyDLL(None).usleep(5_000_000)
peers.exchange("still here", 1)
print("alive", flush=True)
if number: ctypes.PyDLL(None).usleep(60_000_000)
block()
"""
    with cluster(program(scenario), lost_s=4.0) as run:
        run.wait_until_ready()
        run.wait_for(0, "alive")
        stopped_at = run.send(1, signal.SIGSTOP)
        code, text = run.outcome(0)
        assert code == 1
        assert "error: process 1 " in text
        assert time.monotonic() - stopped_at < 4.0


def test_killed_with_a_forked_child_that_lives_on():
    """The child has the parent's connections, too; they must not look alive for that."""
    scenario = """
if number == 1:
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
block()
"""
    with cluster(program(scenario)) as run:
        run.wait_until_ready()
        stdout = run.processes[1].stdout
        assert stdout is not None
        child = int(stdout.readline())
        try:
            killed_at = run.send(1, signal.SIGKILL)
            assert run.outcome(0)[0] == 1
            assert time.monotonic() - killed_at < 5
        finally:
            os.kill(child, signal.SIGKILL)


def test_what_was_printed_is_not_lost():
    with cluster(program("print('not flushed'); os.write(2, b'.'); time.sleep(60)")) as run:
        run.wait_until_ready()
        stdout, stderr = run.processes[0].stdout, run.processes[0].stderr
        assert stdout is not None
        assert stderr is not None
        assert stderr.read(1) == "."
        run.send(1, signal.SIGKILL)
        assert stdout.read() == "not flushed\n"


def test_nobody_reads_the_message():
    """A full pipe on standard error does not keep the process."""
    with cluster(program("os.write(1, b'.\\n'); os.write(2, b'x' * 1_000_000)")) as run:
        run.wait_until_ready()
        run.wait_for(0, ".")
        run.send(1, signal.SIGKILL)
        assert run.processes[0].wait(WAIT_S) == 1


# --- a process fails


@pytest.mark.parametrize(
    ("ending", "code", "given", "written"),
    [
        ("raise ValueError('no\\nway')", 1, "failed: ValueError: no way", "ValueError: no\nway"),
        ("sys.exit(3)", 3, "failed: ended with exit code 3", ""),
        ("sys.exit('bad')", 1, "failed: ended with exit code 1", "bad\n"),
        ("raise KeyboardInterrupt", 130, "was ended by SIGINT", "KeyboardInterrupt"),
        ("peers.fail('not today')", 1, "failed: not today", ""),
        ("os._exit(4)", 4, "was killed or crashed", ""),
    ],
)
def test_failed(ending, code, given, written):
    # It waits until all are ready, and the test closes its standard input.
    scenario = f"if number == 0: block()\nsys.stdin.read()\n{ending}"
    with cluster(program(scenario)) as run:
        run.wait_until_ready()
        found, text = run.outcome(1)
        assert found == code
        assert written in text
        found, text = run.outcome(0)
        assert found == 1
        assert re.fullmatch(rf"error: process 1 .*, {given}\. It had completed 7 .*\n", text) or (
            "was killed or crashed" in given and given in text
        )


def test_a_failure_that_follows_from_a_loss():
    """Only the loss is reported, not the exception that it caused, even if that comes first."""
    scenario = """
if number: block()
print("holds the lock", flush=True)
ctypes.PyDLL(None).usleep(500_000)
raise ValueError("connection closed")
"""
    with cluster(program(scenario)) as run:
        run.wait_until_ready()
        run.wait_for(0, "holds the lock")
        run.send(1, signal.SIGKILL)
        code, text = run.outcome(0)
        assert code == 1
        assert text.startswith("error: process 1 ")
        assert "Traceback" not in text


# --- signals


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("doing", ["time.sleep(60)", "block()"])
def test_asked_to_end(what, doing):
    with cluster(program(doing)) as run:
        run.wait_until_ready()
        if doing == "block()":
            run.wait_for(1, "blocked")
            time.sleep(0.2)
        sent_at = run.send(1, what)
        code, text = run.outcome(1)
        assert code == 128 + what
        assert ("while the main thread was blocked" in text) == (doing == "block()")
        code, text = run.outcome(0)
        assert code == 1
        assert f"was ended by {what.name}. It had completed" in text
        assert time.monotonic() - sent_at < 8


def test_a_program_that_handles_sigterm_itself():
    scenario = """
from pdjax.distributed import signals
signals._REACT_S = 0.2
done = []
signal.signal(signal.SIGTERM, lambda *_: done.append(1))
print("set", flush=True)
while not done: time.sleep(0.01)
time.sleep(0.5)
"""
    with cluster(program(scenario)) as run:
        run.wait_until_ready()
        for number in range(2):
            run.wait_for(number, "set")
            run.send(number, signal.SIGTERM)
        assert [run.outcome(number) for number in range(2)] == [(0, "")] * 2


def test_a_forked_child_that_is_asked_to_end():
    """Its signal is not the parent's."""
    scenario = """
from pdjax.distributed import signals
signals._REACT_S = 0.2
child = os.fork()
if not child: time.sleep(60)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
time.sleep(0.5)
"""
    with cluster(program(scenario)) as run:
        run.wait_until_ready()
        assert [run.outcome(number)[0] for number in range(2)] == [0, 0]


# --- ending well


def test_ended_at_different_times():
    scenario = """
import atexit
atexit.register(print, "bye", flush=True)
time.sleep(0.5 * number)
"""
    with cluster(program(scenario), 3) as run:
        run.wait_until_ready()
        for process in run.processes:
            assert process.stdout is not None
            assert process.stdout.read() == "bye\n"
            assert process.wait(WAIT_S) == 0


def test_a_run_after_a_run():
    """After `shutdown` nothing is left of the first: no hooks, no port."""
    scenario = """
hooks = sys.excepthook, sys.exit, signal.getsignal(signal.SIGINT)
startup.shutdown()
assert startup.current() is None
assert (sys.excepthook, sys.exit, signal.getsignal(signal.SIGINT)) != hooks
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
again = startup.meet(
    options.StartOptions(*known, 20.0),
    RendezvousClient if number else RendezvousServer,
    time.monotonic() + 20,
)
assert again.exchange("second", number) == [0, 1]
"""
    with cluster(program(scenario)) as run:
        assert [run.outcome(number) for number in range(2)] == [(0, "")] * 2


# --- with JAX


def test_with_jax():
    """JAX's processes are ours; they may end at different times. A proxy is not asked."""
    scenario = """
os.environ["http_proxy"] = "http://127.0.0.1:9"
assert pdjax.distributed.is_needed()
assert pdjax.distributed.current() is None
peers = pdjax.distributed.initialize()
assert pdjax.distributed.current() is peers
assert (jax.process_count(), jax.process_index()) == (2, number)
assert len(jax.devices()) == 2 * len(jax.local_devices())
from jax.experimental import multihost_utils
assert multihost_utils.process_allgather(np.array(number)).tolist() == [0, 1]
time.sleep(0.5 * (1 - number))
if number: pdjax.distributed.shutdown()
"""
    with cluster(WITH_JAX + scenario) as run:
        assert [run.outcome(number)[0] for number in range(2)] == [0, 0]


SLURM = """
port = os.environ.pop("PDJAX_COORDINATOR").rpartition(":")[2]
del os.environ["PDJAX_NUM_PROCESSES"], os.environ["PDJAX_PROCESS_ID"]
os.environ.update(JAX_COORDINATOR_PORT=port, SLURM_JOB_ID="7", SLURM_STEP_NODELIST="localhost",
                  SLURM_NTASKS="3", SLURM_PROCID=str(number), SLURM_LOCALID=str(number))
assert pdjax.distributed.is_needed()
"""


@pytest.mark.parametrize(
    ("lost", "what", "cluster_says"),
    [(0, signal.SIGKILL, ""), (1, signal.SIGTERM, SLURM)],
    ids=["the coordinator is killed", "SIGTERM under Slurm"],
)
def test_lost_with_jax(lost, what, cluster_says):
    """No abort from C++, and SIGTERM ends a process."""
    scenario = """
peers = pdjax.distributed.initialize()
jax.devices()
""" + READY + "time.sleep(60)"  # fmt: skip
    with cluster(WITH_JAX + cluster_says + scenario, 3) as run:
        run.wait_until_ready()
        sent_at = run.send(lost, what)
        for number in {0, 1, 2} - {lost}:
            code, text = run.outcome(number)
            assert code == 1
            assert f"error: process {lost} " in text
            assert ("was ended by SIGTERM" in text) == (what == signal.SIGTERM)
            assert "stack trace" not in text
        assert time.monotonic() - sent_at < 5


def test_jax_was_told_before():
    scenario = """
jax.distributed.initialize(os.environ["PDJAX_COORDINATOR"], 2, number)
assert pdjax.distributed.is_needed()
try:
    pdjax.distributed.initialize("localhost:1", 3, number)
except ValueError as error:
    assert "jax.distributed.initialize was called with 2" in str(error)
peers = pdjax.distributed.initialize()
assert (peers.process_id, peers.num_processes) == (number, 2)
""" + READY + "if number: sys.exit(3)\ntime.sleep(60)"  # fmt: skip
    with cluster(WITH_JAX + scenario) as run:
        run.wait_until_ready()
        assert run.outcome(1)[0] == 3
        code, text = run.outcome(0)
        assert code == 1
        assert "error: process 1 " in text


def test_jax_was_used_before():
    """All receive it, also the one that did nothing wrong."""
    scenario = """
if number: jax.devices()
pdjax.distributed.initialize()
"""
    with cluster(WITH_JAX + scenario) as run:
        for number in range(2):
            code, text = run.outcome(number)
            assert code == 1
            assert "ClusterError: process 1" in text
            assert "JAX was used before pdjax.distributed.initialize was called" in text
