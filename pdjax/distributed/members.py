"""Who takes part in a run, and whether those who came fit together."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Address:
    """A host and a TCP port.

    Attributes:
        host: name or IP address; empty for the host of the coordinator, which each process may know
            by another name.
    """

    host: str
    port: int

    @staticmethod
    def parse(text: str) -> Address:
        """Reads HOST:PORT, or [IPv6]:PORT.

        Raises:
            ValueError: if it is not of this form.
        """
        host, colon, port = text.strip().rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        bare = host[1:-1] if bracketed else host
        ambiguous = ":" in bare and not bracketed
        valid = port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16
        if not (colon and bare and valid) or ambiguous or any(c in bare for c in " /[]"):
            raise ValueError(
                f"coordinator {text!r}: expected HOST:PORT with a port from 1 to 65535, such as "
                "node0:12345 or 10.0.0.1:12345; an IPv6 address goes in brackets."
            )
        return Address(bare, int(port))

    def seen_from(self, coordinator: str) -> Address:
        """The same with a host, for a process that knows the coordinator's by that name."""
        return self if self.host else replace(self, host=coordinator)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Member:
    """A process as it introduces itself to the others.

    Attributes:
        host: the name of its host.
        address: where it listens for the others.
        token: who connects there must know this.
        versions: of Python and the libraries that must agree.
        lost_peer_timeout_s: seconds after which it takes a silent process for lost.
        problem: why it cannot take part; None if it can.
    """

    process_id: int
    num_processes: int
    host: str
    pid: int
    address: Address
    token: str
    versions: Mapping[str, str]
    lost_peer_timeout_s: float
    problem: str | None = None

    def __str__(self) -> str:
        return f"process {self.process_id} ({self.host}, pid {self.pid})"

    def to_json(self) -> dict[str, Any]:
        """As a value that JSON has a form for."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Member:
        """What `to_json` made.

        Raises:
            KeyError, TypeError: if it is no member.
        """
        return Member(**{**value, "address": Address(**value["address"])})


def introduce(
    process_id: int,
    num_processes: int,
    address: Address,
    versions: Mapping[str, str],
    lost_peer_timeout_s: float,
    problem: str | None = None,
) -> Member:
    """This process as a member."""
    return Member(
        process_id,
        num_processes,
        socket.gethostname(),
        os.getpid(),
        address,
        secrets.token_hex(16),
        dict(versions),
        lost_peer_timeout_s,
        problem,
    )


def find_disagreement(members: Sequence[Member]) -> str | None:
    """Why these processes cannot run together, in words; None if they can."""
    return (
        _own_problems(members)
        or _counts_differ(members)
        or _ids_collide(members)
        or _versions_differ(members)
    )


def _own_problems(members: Sequence[Member]) -> str | None:
    said = [f"{member} cannot take part: {member.problem}" for member in members if member.problem]
    return "\n".join(said) or None


def _counts_differ(members: Sequence[Member]) -> str | None:
    counts = {str(member): str(member.num_processes) for member in members}
    if len(set(counts.values())) > 1:
        return (
            f"the processes disagree about num_processes: {_who_has_what(counts)}. "
            "Give all of them the same."
        )
    return None


def _ids_collide(members: Sequence[Member]) -> str | None:
    by_id: dict[int, list[Member]] = {}
    for member in members:
        by_id.setdefault(member.process_id, []).append(member)
    for process_id, same in by_id.items():
        if len(same) > 1:
            who = " and ".join(f"pid {member.pid} on {member.host}" for member in same)
            return (
                f"{len(same)} processes have the process_id {process_id}: {who}. "
                f"Give each its own, from 0 to {same[0].num_processes - 1}."
            )
        if not 0 <= process_id < same[0].num_processes:
            return (
                f"{same[0]}: expected a process_id from 0 to {same[0].num_processes - 1}, "
                f"num_processes being {same[0].num_processes}."
            )
    return None


def _versions_differ(members: Sequence[Member]) -> str | None:
    lines = []
    for name in sorted({name for member in members for name in member.versions}):
        have = {str(member): member.versions.get(name, "not installed") for member in members}
        if len(set(have.values())) > 1:
            lines.append(f"  {name}: {_who_has_what(have)}")
    if not lines:
        return None
    found = "\n".join(lines)
    return (
        f"the processes run different versions:\n{found}\n"
        "Install the same on every host: the compiled programs have to fit together."
    )


def _who_has_what(have: Mapping[str, str]) -> str:
    values: dict[str, list[str]] = {}
    for who, value in have.items():
        values.setdefault(value, []).append(who)
    return "; ".join(f"{value} in {', '.join(who)}" for value, who in values.items())
