"""A small process beside this one that says that it lives, while it runs no Python.

The thread that watches over the other processes speaks only when it gets Python's interpreter lock,
and some calls keep that for long: 18 s to compile a program with a constant of 1.2 GB, 11 s to
unpickle three million dictionaries. The others would take a process for lost that works. So a
process of its own, which the operating system starts from this file, tells them that it exists and
is not stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_CONNECT_S = 5.0
_END_S = 2.0
_STOPPED = "TtZX"  # in /proc: stopped, or dead


class Heartbeat:
    """The process that speaks for this one; ends with it.

    Args:
        targets: host, port and handshake of each process that receives it.
        frame: what is said again and again.
        interval_s: seconds between two beats.
    """

    def __init__(
        self, targets: Sequence[tuple[str, int, bytes]], frame: bytes, interval_s: float
    ) -> None:
        given = {
            "parent": os.getpid(),
            "targets": [(host, port, handshake.hex()) for host, port, handshake in targets],
            "frame": frame.hex(),
            "interval_s": interval_s,
        }
        self._process: subprocess.Popen[bytes] | None = None
        # Without /proc nothing says that a process is stopped; then it speaks only for itself.
        if targets and os.path.exists(f"/proc/{os.getpid()}/stat"):
            with contextlib.suppress(OSError):
                self._start(json.dumps(given).encode() + b"\n")

    def stop(self) -> None:
        """Ends it."""
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self, given: bytes) -> None:
        # Without the user's environment and packages it is there at once, and small.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(given)
        self._process.stdin.flush()


def main() -> None:
    """What the process does: speaks until its parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # for its parent, which ends it
    given = json.loads(sys.stdin.buffer.readline())
    connections = _connect(given["targets"])
    frame = bytes.fromhex(given["frame"])
    while os.getppid() == given["parent"]:
        if not _is_stopped(given["parent"]):
            connections = [found for found in connections if _send(found, frame)]
        if select.select([0], [], [], given["interval_s"])[0]:
            return  # the parent has closed its end


def _connect(targets: Sequence[Any]) -> list[socket.socket]:
    connections = []
    for host, port, handshake in targets:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((host, port), _CONNECT_S)
            connection.sendall(bytes.fromhex(handshake))
            connection.setblocking(False)
            connections.append(connection)
    return connections


def _send(connection: socket.socket, frame: bytes) -> bool:
    """Says it is alive, if it can be said at once; returns whether the other is there."""
    try:
        sent = connection.send(frame)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return sent == len(frame)


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            # The name in parentheses may hold anything.
            return stat.read().rpartition(")")[2].split()[0] in _STOPPED
    except (OSError, IndexError):
        return True


if __name__ == "__main__":
    main()
