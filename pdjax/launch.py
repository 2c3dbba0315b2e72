"""`python -m pdjax.launch`: runs a command in several processes of this machine.

Each process is told where the first one listens, how many they are and which one it is, in the
variables PDJAX_COORDINATOR, PDJAX_NUM_PROCESSES and PDJAX_PROCESS_ID, and gets its memory in
large pages (GLIBC_TUNABLES, unless that is set already). Nothing here imports JAX.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Annotated, Any

import tyro

from pdjax.cli import print_error

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_S = 0.02


@dataclass(frozen=True)
class LaunchConfig:
    """Runs a command, given after --, in several processes of this machine.

    Their output comes with the number of the process before each line. If one fails the others are
    ended, and its exit code is returned.
    """

    num_processes: int
    """How many processes."""

    pin: bool = True
    """Whether each process gets a core of its own, in turns if there are fewer cores."""

    grace_s: float = 10.0
    """Seconds that a process has to end before it is killed."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    That of the first process that failed, 128 plus the signal if one ended it; 0 if none failed; 2
    for arguments that make no sense.
    """
    given = sys.argv[1:] if arguments is None else arguments
    at = given.index("--") if "--" in given else len(given)
    config = tyro.cli(
        Annotated[LaunchConfig, tyro.conf.arg(name="")],
        args=given[:at],
        prog="python -m pdjax.launch",
    )
    try:
        return launch(given[at + 1 :], config)
    except (ValueError, OSError) as error:
        print_error(f"error: {error}")
        return 2


def launch(command: Sequence[str], config: LaunchConfig) -> int:
    """Runs `command` in several processes until all have ended; returns the exit code.

    If one fails, or this process is told to end, the others are told to end, too, and are killed
    if they have not after a while. What a process started does not outlive it.

    Args:
        command: the program and its arguments.
        config: how many processes, and how they are treated.

    Raises:
        ValueError: if there is no command, or the number of processes makes no sense.
        OSError: if the command cannot be started.
    """
    _check(command, config)
    coordinator = f"127.0.0.1:{free_port()}"
    with Processes(config.grace_s) as processes:
        for number in range(config.num_processes):
            told = variables(coordinator, config.num_processes, number)
            processes.start(command, str(number), told, number if config.pin else None)
        return processes.wait()


def variables(coordinator: str, num_processes: int, process_id: int) -> dict[str, str]:
    """What a process is told in its environment."""
    return {
        "PDJAX_COORDINATOR": coordinator,
        "PDJAX_NUM_PROCESSES": str(num_processes),
        "PDJAX_PROCESS_ID": str(process_id),
        "PYTHONUNBUFFERED": "1",
        **memory_variables(),
    }


def memory_variables() -> dict[str, str]:
    """What has the C library get memory in large pages, and keep it, unless it is told already.

    A program of XLA takes memory for what it makes, and returns it, at every call. By default much
    of that goes back to the kernel, and comes again in pages of 4 KiB filled with zeros, which
    takes up to a sixth of a step (experiments/cores).
    """
    settings = ("hugetlb=1", f"mmap_threshold={2**25}", f"trim_threshold={2**30}")
    chosen = ":".join(f"glibc.malloc.{setting}" for setting in settings)
    return {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", chosen)}


def free_port() -> int:
    """A port of this machine on which no program listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _check(command: Sequence[str], config: LaunchConfig) -> None:
    if not command:
        raise ValueError(
            "there is no command; expected it after '--', such as: python -m pdjax.launch "
            "--num-processes 2 -- python train.py"
        )
    if config.num_processes < 1:
        raise ValueError(f"--num-processes {config.num_processes}: expected at least 1.")
    if config.grace_s < 0:
        raise ValueError(f"--grace-s {config.grace_s}: expected seconds from 0 on.")


class Processes:
    """Processes that run side by side, each the head of a process group of its own.

    What they write comes with the name of the process before each line. As a context manager it
    passes the signals on that ask this process to end, and lets nothing outlive the block.

    Args:
        grace_s: seconds between the demand to end and the kill.
        end_together: whether the others are told to end when one fails.
    """

    def __init__(self, grace_s: float, end_together: bool = True) -> None:
        self._grace_s = grace_s
        self._end_together = end_together
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._code: int | None = None
        self._handlers: dict[int, Any] = {}
        self.interrupted_by: int | None = None
        """The signal that asked this process to end, if one did."""

    def __enter__(self) -> Processes:
        def forward(number: int, _: object) -> None:
            self._code = self._code or 128 + number
            self.interrupted_by = self.interrupted_by or number
            self.end(number)

        self._handlers = {number: signal.signal(number, forward) for number in _FORWARDED}
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end(signal.SIGTERM)
            self.wait()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    @property
    def codes(self) -> list[int | None]:
        """The exit code of each process, None while it runs, minus the signal if one ended it."""
        return [process.poll() for process in self._processes]

    def start(
        self,
        command: Sequence[str],
        name: str,
        told: Mapping[str, str],
        core: int | None = None,
    ) -> None:
        """Starts one process.

        Args:
            command: the program and its arguments.
            name: what its lines of output begin with.
            told: variables of its environment, besides those of this process.
            core: a number of its own if it shall run on one core only, in turns if they are few.
        """
        with _pinned(core):
            process = subprocess.Popen(
                command,
                env=os.environ | told,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        self._processes.append(process)
        assert process.stdout is not None
        reader = threading.Thread(target=self._copy, args=(process.stdout, name), daemon=True)
        reader.start()
        self._readers.append(reader)

    def wait(self) -> int:
        """Waits until all have ended; returns the exit code of the first that failed, or 0.

        What they started and left behind is killed.
        """
        while any(process.poll() is None for process in self._processes):
            self._look()
            time.sleep(_POLL_S)
        self._look()
        self._send(signal.SIGKILL)  # to what they left behind
        for reader in self._readers:
            reader.join(self._grace_s + _POLL_S)  # longer: held open by what left its group
        self._readers.clear()
        return self._code or 0

    def send(self, index: int, number: int) -> None:
        """Sends a signal to one of the processes, and what it started, if still there."""
        _signal(self._processes[index], number)

    def end(self, number: int) -> None:
        """Demands that those that still run end; they are killed if they do not in time."""
        self._send(number)
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s

    def _look(self) -> None:
        """Notes the first failure, and kills those that take too long to end."""
        for process in self._processes:
            code = process.poll()
            if code and self._code is None:
                self._code = 128 - code if code < 0 else code
                if self._end_together:
                    self.end(signal.SIGTERM)
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None or number == signal.SIGKILL:
                _signal(process, number)

    def _copy(self, lines: IO[str], name: str) -> None:
        with lines:
            for line in lines:
                with self._lock:
                    sys.stdout.write(f"[{name}] {line.rstrip()}\n")
                    sys.stdout.flush()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """Sends a signal to a process and what it started, if any of that is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _pinned(number: int | None) -> Iterator[None]:
    """What is started inside may run on one core only, the cores being shared out in turns."""
    if number is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, {cores[number % len(cores)]})
        yield
    finally:
        os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    sys.exit(main())
