"""Where other processes come in once they have met."""

from __future__ import annotations

import selectors
import socket
import time

from pdjax.distributed.frames import ForeignError, Link, Message, encode
from pdjax.distributed.members import Member


class Door:
    """Takes connections, and lets in those who know the secret of this process.

    Args:
        listener: where they come; owned by the door from now on.
        token: what they must know.

    Attributes:
        pulses: for each process whose `Pulse` has come, the link to that.
    """

    def __init__(self, listener: socket.socket, token: str) -> None:
        self.pulses: dict[int, Link] = {}
        self._listener = listener
        self._token = token
        self._strangers: set[Link] = set()
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def fileno(self) -> int:
        """For selectors: ready if somebody may come in."""
        return self._selector.fileno()  # pyright: ignore[reportAttributeAccessIssue]

    def admit(self, timeout_s: float) -> list[tuple[int, Link]]:
        """Waits for something to happen; returns who may come in, by number; keeps the pulses."""
        admitted = []
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
                continue
            link = key.fileobj
            assert isinstance(link, Link)
            message = self._hear(link)
            if message is None:
                continue
            self._strangers.discard(link)
            self._selector.unregister(link)
            if message.get("token") != self._token:
                link.close()
            elif message["is_pulse"]:
                self.pulses[message["hello"]] = link
            else:
                admitted.append((message["hello"], link))
        return admitted

    def close(self) -> None:
        """Lets nobody in any more; sends away those who wait."""
        self._selector.close()
        self._listener.close()
        for link in (*self._strangers, *self.pulses.values()):
            link.close()

    def _accept(self) -> None:
        try:
            link = Link(self._listener.accept()[0])
        except OSError:
            return  # gone already
        self._strangers.add(link)
        self._selector.register(link, selectors.EVENT_READ)

    def _hear(self, link: Link) -> Message | None:
        """The first message; empty from those who have nothing to say here; None if it may come."""
        try:
            messages = link.read(time.monotonic())
        except ForeignError:
            return {}
        if messages:
            # A process says nothing more until all are connected; more of a pulse is no loss.
            return messages[0]
        return {} if link.ended is not None else None


def greeting(own_id: int, to: Member, *, is_pulse: bool = False) -> bytes:
    """What opens the door of another process."""
    return encode({"hello": own_id, "token": to.token, "is_pulse": is_pulse})
