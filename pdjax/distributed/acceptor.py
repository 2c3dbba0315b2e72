"""The acceptor of connections from the other processes of a run, after the rendezvous."""

from __future__ import annotations

import selectors
import socket
import time

from pdjax.distributed.frames import ForeignError, Link, Message, encode
from pdjax.distributed.members import Member


class Acceptor:
    """Accepts connections, and admits those that send the token of this process.

    Args:
        listener: the listening socket; owned by the acceptor from now on.
        token: the secret that a connection must send first.

    Attributes:
        heartbeats: for each process whose `Heartbeat` has connected, the link to it.
    """

    def __init__(self, listener: socket.socket, token: str) -> None:
        self.heartbeats: dict[int, Link] = {}
        self._listener = listener
        self._token = token
        self._unauthenticated: set[Link] = set()
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def fileno(self) -> int:
        """For selectors: ready if a connection waits."""
        return self._selector.fileno()  # pyright: ignore[reportAttributeAccessIssue]

    def admit(self, timeout_s: float) -> list[tuple[int, Link]]:
        """Waits for connections; returns the admitted ones by process, and keeps heartbeats."""
        admitted = []
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
                continue
            link = key.fileobj
            assert isinstance(link, Link)
            message = self._receive(link)
            if message is None:
                continue
            self._unauthenticated.discard(link)
            self._selector.unregister(link)
            if message.get("token") != self._token:
                link.close()
            elif message["is_heartbeat"]:
                self.heartbeats[message["hello"]] = link
            else:
                admitted.append((message["hello"], link))
        return admitted

    def close(self) -> None:
        """Accepts no more connections, and closes those that are not admitted yet."""
        self._selector.close()
        self._listener.close()
        for link in (*self._unauthenticated, *self.heartbeats.values()):
            link.close()

    def _accept(self) -> None:
        try:
            link = Link(self._listener.accept()[0])
        except OSError:
            return  # gone already
        self._unauthenticated.add(link)
        self._selector.register(link, selectors.EVENT_READ)

    def _receive(self, link: Link) -> Message | None:
        """The first message; empty from those who have nothing to say here; None if it may come."""
        try:
            messages = link.read(time.monotonic())
        except ForeignError:
            return {}
        if messages:
            # A process says nothing more until all are connected; more of a heartbeat is no loss.
            return messages[0]
        return {} if link.ended is not None else None


def handshake(own_id: int, to: Member, *, is_heartbeat: bool = False) -> bytes:
    """The first message of a connection to another process."""
    return encode({"hello": own_id, "token": to.token, "is_heartbeat": is_heartbeat})
