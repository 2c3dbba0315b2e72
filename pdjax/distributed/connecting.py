"""A connection between any two processes."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Sequence

from pdjax.distributed.frames import ForeignError, Link, Message, encode
from pdjax.distributed.members import Address, Member
from pdjax.errors import ClusterError

_LEAST_S = 0.1
_LOOK_S = 0.2


def connect_all(
    members: Sequence[Member],
    own_id: int,
    coordinator: str,
    listener: socket.socket,
    deadline: float,
    look: Callable[[], None] = lambda: None,
) -> dict[int, Link]:
    """Connects this process to all others; returns the links by process id.

    Each connects to those with smaller numbers, and is connected to by those with larger ones.

    Args:
        members: all processes, in order.
        own_id: which of them this is.
        coordinator: the host of the coordinator, as this process knows it.
        listener: where this process listens, as its `Member` says.
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
        with _Door(listener, members[own_id].token) as door:
            while waiting:
                if time.monotonic() > deadline:
                    raise ClusterError(_not_connected(members, sorted(waiting)))
                look()
                for process_id, link in door.admit(waiting):
                    waiting.discard(process_id)
                    links[process_id] = link
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return links


def _connect(member: Member, own_id: int, coordinator: str, deadline: float) -> Link:
    address = Address(member.address.host or coordinator, member.address.port)
    remaining = max(deadline - time.monotonic(), _LEAST_S)
    try:
        # It listens already: if it refuses, it will not do so later.
        link = Link(socket.create_connection((address.host, address.port), remaining))
    except OSError as error:
        raise ClusterError(
            f"no connection to {member} at {address} ({error}). Has it ended, or does a firewall "
            "not let all ports through between the hosts?"
        ) from error
    link.send(encode({"hello": own_id, "token": member.token}))
    return link


class _Door:
    """Takes the connections of others, and lets in those who know the token."""

    def __init__(self, listener: socket.socket, token: str) -> None:
        self._listener = listener
        self._token = token
        self._strangers: set[Link] = set()
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def __enter__(self) -> _Door:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for link in self._strangers:
            link.close()

    def admit(self, expected: set[int]) -> list[tuple[int, Link]]:
        """Waits a moment for something to happen; returns those who may come in now."""
        admitted = []
        for key, _ in self._selector.select(_LOOK_S):
            if key.fileobj is self._listener:
                self._accept()
                continue
            link = key.fileobj
            assert isinstance(link, Link)
            message = self._hear(link)
            if message is not None:
                self._strangers.discard(link)
                self._selector.unregister(link)
                if message.get("token") == self._token and message.get("hello") in expected:
                    admitted.append((message["hello"], link))
                else:
                    link.close()
        return admitted

    def _accept(self) -> None:
        try:
            link = Link(self._listener.accept()[0])
        except OSError:
            return  # gone already
        self._strangers.add(link)
        self._selector.register(link, selectors.EVENT_READ)

    def _hear(self, link: Link) -> Message | None:
        try:
            messages = link.read(time.monotonic())
        except ForeignError:
            return {}
        if messages:
            # A process says nothing more until all are connected.
            return messages[0]
        return {} if link.ended is not None else None


def _not_connected(members: Sequence[Member], missing: Sequence[int]) -> str:
    who = ", ".join(str(members[number]) for number in missing)
    return f"{who} did not connect in time. Does a firewall let all ports through between hosts?"
