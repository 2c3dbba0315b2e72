"""A way to JAX's coordination service that does not break when the service dies.

JAX's client aborts its process from C++, within milliseconds, when its connection to the service
breaks. So the client is connected to a proxy in its own process, which forwards the messages, and
simply says nothing more when the service is gone. That leaves the watch over the other processes
the time to say who is lost, and to end the process in order.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

_CHUNK_BYTES = 1 << 16
_RETRY_S = 0.05


class CoordinatorProxy:
    """Listens on this host, and connects each client with a server elsewhere.

    Args:
        host: of the server.
        port: of the server.
        deadline: until when a server that does not listen yet is tried again, as `time.monotonic`
            has it.
    """

    def __init__(self, host: str, port: int, deadline: float) -> None:
        self._target = host, port
        self._deadline = deadline
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._start(self._accept)

    @property
    def address(self) -> str:
        """Where it listens, as HOST:PORT."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        far = self._connect()
        if far is None:
            near.close()
            return
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._start(self._backward, far, near)
        _copy(near, far)
        for end in (near, far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # `close` alone leaves the other thread waiting
            end.close()

    def _backward(self, far: socket.socket, near: socket.socket) -> None:
        _copy(far, near)  # and then `near` stays open, in silence

    def _connect(self) -> socket.socket | None:
        while True:
            try:
                connected = socket.create_connection(self._target, 10.0)
            except OSError:
                if time.monotonic() > self._deadline:
                    return None
                time.sleep(_RETRY_S)
                continue
            connected.settimeout(None)
            return connected

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        threading.Thread(target=work, args=arguments, name="pdjax-proxy", daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            sink.sendall(data)
