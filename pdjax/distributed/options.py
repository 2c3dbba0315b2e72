"""What `pdjax.distributed.initialize` was given, and where the rest is found."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdjax.distributed.members import Address

VARIABLES = {
    "coordinator": "PDJAX_COORDINATOR",
    "num_processes": "PDJAX_NUM_PROCESSES",
    "process_id": "PDJAX_PROCESS_ID",
}


@dataclass(frozen=True)
class StartOptions:
    """How this process takes part in a run, checked.

    Attributes:
        coordinator: where process 0 can be reached.
        lost_peer_timeout_s: seconds within which the loss of a process ends the others.
    """

    coordinator: Address
    num_processes: int
    process_id: int
    lost_peer_timeout_s: float

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes {self.num_processes}: expected at least 1.")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id {self.process_id}: expected from 0 to {self.num_processes - 1}, "
                f"num_processes being {self.num_processes}."
            )


def check_seconds(timeout_s: float, lost_peer_timeout_s: float) -> None:
    """Refuses times that make no sense.

    Raises:
        ValueError: saying which.
    """
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ValueError(f"timeout_s {timeout_s}: expected seconds, more than 0.")
    if not (lost_peer_timeout_s >= 1 and math.isfinite(lost_peer_timeout_s)):
        raise ValueError(
            f"lost_peer_timeout_s {lost_peer_timeout_s}: expected at least 1 second; a busy "
            "machine may well keep a process waiting for a part of that."
        )


def given_or_environment(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[Address, int, int] | None:
    """The three that say how a process takes part; None if none of them is known.

    Raises:
        ValueError: if one makes no sense, or only some are known.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    known: dict[str, Any] = {}
    for name, variable in VARIABLES.items():
        value = given[name] if given[name] is not None else os.environ.get(variable) or None
        if value is not None:
            known[name] = value
    if not known:
        return None
    missing = [f"{name} (or {VARIABLES[name]})" for name in VARIABLES if name not in known]
    if missing:
        have = " and ".join(f"{name} {value}" for name, value in known.items())
        raise ValueError(
            f"got {have}, but no {' and no '.join(missing)}; expected all three, or none of them "
            "where the cluster says them (Slurm, Open MPI, Kubernetes, TPU pods)."
        )
    return (
        Address.parse(str(known["coordinator"])),
        _whole("num_processes", known["num_processes"]),
        _whole("process_id", known["process_id"]),
    )


def check_same(known: tuple[Address, int, int] | None, num_processes: int, process_id: int) -> None:
    """Refuses arguments that contradict those JAX was started with.

    Raises:
        ValueError: naming both.
    """
    if known is not None and known[1:] != (num_processes, process_id):
        raise ValueError(
            f"got num_processes {known[1]} and process_id {known[2]}, but "
            f"jax.distributed.initialize was called with {num_processes} and {process_id}. Leave "
            "them out, or leave that call to pdjax.distributed.initialize."
        )


def device_ids(local_device_ids: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """The devices of this host that a process uses, as a tuple.

    Raises:
        ValueError: if these are no numbers of devices.
    """
    if local_device_ids is None:
        return None
    several = [local_device_ids] if isinstance(local_device_ids, int) else list(local_device_ids)
    ids = tuple(_whole("local_device_ids", number) for number in several)
    if not ids or min(ids) < 0 or len(set(ids)) < len(ids):
        raise ValueError(
            f"local_device_ids {list(ids)}: expected numbers of devices from 0 on, each once."
        )
    return ids


def _whole(name: str, value: Any) -> int:
    try:
        return int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} {value!r}: expected a whole number.") from None
