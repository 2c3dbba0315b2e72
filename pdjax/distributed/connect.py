"""A connection between any two processes."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence

from pdjax.distributed.acceptor import Acceptor, handshake
from pdjax.distributed.frames import Link
from pdjax.distributed.members import Member
from pdjax.errors import ClusterError

_LEAST_S = 0.1
_LOOK_S = 0.2


def connect_all(
    members: Sequence[Member],
    own_id: int,
    coordinator: str,
    acceptor: Acceptor,
    deadline: float,
    look: Callable[[], None],
) -> dict[int, Link]:
    """Connects this process to all others; returns the links by process id.

    Each connects to those with smaller numbers, and is connected to by those with larger ones.

    Args:
        members: all processes, in order.
        own_id: which of them this is.
        coordinator: the host of the coordinator, as this process knows it.
        acceptor: where the others come in.
        deadline: when to give up, as `time.monotonic` has it.
        look: called now and then; raises if it makes no sense to go on.

    Raises:
        ClusterError: if it does not succeed in time.
    """
    links: dict[int, Link] = {}
    try:
        for member in members[:own_id]:
            links[member.process_id] = _connect(member, own_id, coordinator, deadline)
        waiting = {member.process_id for member in members[own_id + 1 :]}
        while waiting:
            if time.monotonic() > deadline:
                raise ClusterError(_not_connected(members, sorted(waiting)))
            look()
            for process_id, link in acceptor.admit(_LOOK_S):
                waiting.discard(process_id)
                links[process_id] = link
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return links


def _connect(member: Member, own_id: int, coordinator: str, deadline: float) -> Link:
    address = member.address.seen_from(coordinator)
    remaining = max(deadline - time.monotonic(), _LEAST_S)
    try:
        # It listens already: if it refuses, it will not do so later.
        link = Link(socket.create_connection((address.host, address.port), remaining))
    except OSError as error:
        raise ClusterError(
            f"no connection to {member} at {address} ({error}). Has it ended, or does a firewall "
            "not let all ports through between the hosts?"
        ) from error
    link.send(handshake(own_id, member))
    return link


def _not_connected(members: Sequence[Member], missing: Sequence[int]) -> str:
    who = ", ".join(str(members[number]) for number in missing)
    return f"{who} did not connect in time. Does a firewall let all ports through between hosts?"
