"""Every cluster of this machine holds a slot, by a lock; the kernel lets it go when its owner dies.

Namespaces of a slot without a holder were left behind by a run that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from layout import HOSTS_FILES, prefix

LOCKS = Path("/run/pdjax-cluster")
_NAMESPACES = Path("/run/netns")
_POLL_S = 0.01
_DEATH_S = 10.0


@contextlib.contextmanager
def claimed(folder: Path = LOCKS) -> Iterator[int]:
    """Holds the first free slot. What is found under free slots is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.lock"):
        with _held(path) as held:
            if held:
                remove(int(path.stem))
    for slot in itertools.count():
        with _held(folder / f"{slot}.lock") as held:
            if held:
                remove(slot)
                yield slot
                return


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Holds a lock, unless another does. Its file stays: one that is removed may be held twice."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def remove(slot: int) -> None:
    """Removes the cluster in a slot, and kills the processes on its hosts."""
    for namespace in _namespaces(slot):
        kill(namespace)
        subprocess.run(["ip", "netns", "delete", namespace], check=True)
    for files in HOSTS_FILES.glob(f"{prefix(slot)}*"):
        shutil.rmtree(files)


def _namespaces(slot: int) -> list[str]:
    """Those of a slot, the hosts first."""
    return sorted(path.name for path in _NAMESPACES.glob(f"{prefix(slot)}*"))


def kill(namespace: str) -> None:
    """Kills the processes in a namespace, and waits until they are gone."""
    deadline = time.monotonic() + _DEATH_S
    while pids := _pids(namespace):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {pids} in {namespace} do not die.")
        time.sleep(_POLL_S)


def _pids(namespace: str) -> list[int]:
    shown = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in shown.stdout.split()]
