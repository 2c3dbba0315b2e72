"""`python -m pdjax.launch`: processes are started, told apart, and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from pdjax.launch import LaunchConfig, Processes, launch, main

SLEEP = "import time; time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('ready', flush=True); time.sleep(60)"
)


def run(code: str, num_processes: int = 2, **options) -> int:
    return launch([sys.executable, "-c", code], LaunchConfig(num_processes, **options))


def test_every_process_is_told_which_one_it_is(capfd):
    names = "PDJAX_COORDINATOR", "PDJAX_NUM_PROCESSES", "PDJAX_PROCESS_ID"
    assert run(f"import os; print(*(os.environ[n] for n in {names}))", 3) == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    words = [line.split() for line in lines]
    assert [(w[0], w[2], w[3]) for w in words] == [(f"[{n}]", "3", str(n)) for n in range(3)]
    assert len({w[1] for w in words}) == 1
    assert words[0][1].startswith("127.0.0.1:")


@pytest.mark.parametrize(("given", "expected"), [(None, "glibc.malloc.hugetlb=1"), ("x", "x")])
def test_memory_comes_in_large_pages_unless_it_is_said_how(given, expected, capfd, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    assert run("import os; print(os.environ['GLIBC_TUNABLES'])", 1) == 0
    assert capfd.readouterr().out.startswith(f"[0] {expected}")


def test_output_and_errors_come_line_by_line(capfd):
    assert run("import sys; print('a'); print('b', file=sys.stderr); print('c', end='')", 1) == 0
    assert capfd.readouterr().out == "[0] a\n[0] b\n[0] c\n"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
@pytest.mark.parametrize("pin", [True, False])
def test_processes_are_pinned_in_turns(capfd, pin):
    before = os.sched_getaffinity(0)
    assert run("import os; print(*sorted(os.sched_getaffinity(0)))", 3, pin=pin) == 0
    found = dict(line.split(" ", 1) for line in capfd.readouterr().out.splitlines())
    cores = sorted(before)
    for number in range(3):
        expected = [cores[number % len(cores)]] if pin else cores
        assert found[f"[{number}]"] == " ".join(map(str, expected))
    assert os.sched_getaffinity(0) == before


def test_the_first_failure_ends_the_others_and_is_returned():
    start = time.monotonic()
    code = "import os, sys, time\nif os.environ['PDJAX_PROCESS_ID'] == '1': sys.exit(7)\n"
    assert run(code + "time.sleep(60)", 3) == 7
    assert time.monotonic() - start < 30


def test_one_may_fail_alone():
    with Processes(grace_s=5, end_together=False) as processes:
        for number in range(2):
            processes.start([sys.executable, "-c", SLEEP], str(number), {})
        processes.send(0, signal.SIGKILL)
        while processes.codes[0] is None:
            time.sleep(0.01)
        assert processes.codes == [-signal.SIGKILL, None]
        processes.send(0, signal.SIGTERM)  # nothing is there any more
        processes.send(1, signal.SIGTERM)
        assert processes.wait() in {128 + signal.SIGKILL, 128 + signal.SIGTERM}
    assert processes.codes == [-signal.SIGKILL, -signal.SIGTERM]
    assert processes.interrupted_by is None


def test_a_process_that_was_killed():
    code = "import os, signal\nif os.environ['PDJAX_PROCESS_ID'] == '0': "
    code += "os.kill(os.getpid(), signal.SIGKILL)\n" + SLEEP
    assert run(code) == 128 + signal.SIGKILL


@pytest.mark.parametrize("ignores", [True, False])
def test_one_that_does_not_end_is_killed_with_what_it_started(tmp_path, ignores):
    """Its child, which ignores the demand in any case, is gone afterwards."""
    path = tmp_path / "pid"
    code = (
        "import os, subprocess, sys, time, signal\n"
        "if os.environ['PDJAX_PROCESS_ID'] == '1':\n"
        f"    while not os.path.exists({str(path)!r}): time.sleep(0.01)\n"
        "    sys.exit(3)\n"
        f"if {ignores}: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        f"open({str(path) + '.new'!r}, 'w').write(str(child.pid))\n"
        f"os.rename({str(path) + '.new'!r}, {str(path)!r})\n"
        "time.sleep(60)"
    )
    assert run(code, grace_s=0.2) == 3
    for _ in range(500):
        if not _is_alive(int(path.read_text())):
            return
        time.sleep(0.02)
    pytest.fail("the child lives on")


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(number):
    code = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: (print('given', flush=True), sys.exit(5)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-m", "pdjax.launch", "--num-processes", "2", "--"]
    with subprocess.Popen(
        [*command, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        ready = sorted(process.stdout.readline() for _ in range(2))
        assert ready == ["[0] ready\n", "[1] ready\n"]
        process.send_signal(number)
        given = sorted(process.stdout.readlines())
        assert given == ["[0] given\n", "[1] given\n"]
        assert process.wait(30) == 128 + number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-processes", "2"], "there is no command"),
        (["--num-processes", "2", "--"], "there is no command"),
        (["--num-processes", "0", "--", "true"], "--num-processes 0: expected at least 1"),
        (["--num-processes", "1", "--grace-s", "-1", "--", "true"], "--grace-s -1.0"),
        (["--num-processes", "1", "--", "no-such-program"], "no-such-program"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capfd):
    assert main(arguments) == 2
    assert message in capfd.readouterr().err
