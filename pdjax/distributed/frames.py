"""Messages between processes: JSON values on a TCP connection, each with its length before it."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from typing import Any

Message = dict[str, Any]

_HEADER = struct.Struct("!4sI")
_MAGIC = b"pdjx"
_CHUNK_BYTES = 1 << 16
_MAX_BYTES = 1 << 26


class ForeignError(Exception):
    """What came is no message of pdjax: the other end is some other program."""


def encode(message: Message) -> bytes:
    """The bytes of a message on the wire.

    Raises:
        TypeError, ValueError: if it holds what JSON has no form for, or is too long.
    """
    body = json.dumps(message).encode()
    if len(body) > _MAX_BYTES:
        raise ValueError(
            f"a message of {len(body):,} bytes: expected at most {_MAX_BYTES:,}. It is for small "
            "values; arrays go through JAX."
        )
    return _HEADER.pack(_MAGIC, len(body)) + body


class Link:
    """A connection to another process that never blocks.

    Args:
        connection: the connected socket, which the link owns from now on.

    Attributes:
        ended: why nothing more can come; None while the connection stands.
        heard_at: when something last came, as `time.monotonic` has it.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self.ended: str | None = None
        self.heard_at = 0.0

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    @property
    def has_outgoing(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._outgoing) and self.ended is None

    @property
    def own_address(self) -> str:
        """The IP address of this end; empty if the connection is broken."""
        try:
            return str(self._socket.getsockname()[0])
        except OSError:
            return ""

    def send(self, frame: bytes) -> None:
        """Sends an encoded message, as far as that goes now; `flush` sends the rest."""
        self._outgoing += frame
        self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as that goes now."""
        while self.has_outgoing:
            try:
                sent = self._socket.send(self._outgoing)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                # The reason comes with the next read, after all that was sent before the break.
                self._outgoing.clear()
                return
            del self._outgoing[:sent]

    def read(self, now: float) -> list[Message]:
        """What has come by now; afterwards `ended` says whether more can come.

        Raises:
            ForeignError: if the other end is no process of pdjax.
        """
        self._receive(now)
        return self._decode()

    def finish(self) -> None:
        """Says that nothing more is sent here."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def skim(self, now: float) -> None:
        """As `read`, but forgets what has come."""
        self._receive(now)
        self._incoming.clear()

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()
        self.ended = self.ended or "closed here"

    def _receive(self, now: float) -> None:
        while self.ended is None:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self.ended = error.strerror or str(error)
                break
            if not data:
                self.ended = "closed"
                break
            self.heard_at = now
            self._incoming += data

    def _decode(self) -> list[Message]:
        messages = []
        while len(self._incoming) >= _HEADER.size:
            magic, size = _HEADER.unpack_from(self._incoming)
            if magic != _MAGIC or size > _MAX_BYTES:
                raise ForeignError
            end = _HEADER.size + size
            if len(self._incoming) < end:
                break
            messages.append(_parse(bytes(self._incoming[_HEADER.size : end])))
            del self._incoming[:end]
        if not _MAGIC.startswith(bytes(self._incoming[:4])):
            raise ForeignError
        return messages


def _parse(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except ValueError as error:
        raise ForeignError from error
    if not isinstance(message, dict):
        raise ForeignError
    return message
