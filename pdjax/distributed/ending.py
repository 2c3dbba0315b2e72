"""How a process of a run ends: well, by its own failure, or because another is lost.

Python tells nobody at exit whether the program succeeded, so an uncaught exception is noted by
`sys.excepthook`, and the code of `sys.exit` by a wrapper around it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from types import TracebackType

from pdjax.distributed.peers import Peers

_LAST_WORDS_S = 1.0


def end_process(message: str, code: int = 1) -> None:
    """Prints a message on standard error and ends the process at once, from whatever thread.

    The main thread may be blocked in a computation that waits for the lost process, and would never
    run another line of Python.
    """
    # In a thread of its own: a pipe that nobody empties must not keep the process alive.
    writer = threading.Thread(target=_speak, args=(message,), daemon=True)
    writer.start()
    writer.join(_LAST_WORDS_S)
    os._exit(code)


def _speak(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode(errors="replace"))
    _flush()


def _flush() -> None:
    _end_children()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _end_children() -> None:
    """Loaders of data and the like would otherwise outlive this process."""
    if "multiprocessing" in sys.modules:
        import multiprocessing

        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.terminate()


class EndOfProgram:
    """Sees how the program ends, and tells the others.

    Args:
        peers: the other processes.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._code = 0
        self._hook = sys.excepthook
        self._exit = sys.exit

    def watch(self) -> None:
        """Starts to look; ends with the program or with `forget`."""
        sys.excepthook = self._on_exception
        sys.exit = self._on_exit
        # Registered after JAX's own, so it runs before that waits for the others.
        atexit.register(self._at_exit)

    def forget(self) -> None:
        """Stops looking."""
        atexit.unregister(self._at_exit)
        # Whoever wrapped these in the meantime keeps what they wrapped.
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._hook
        if sys.exit == self._on_exit:
            sys.exit = self._exit

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        interrupted = issubclass(kind, KeyboardInterrupt)
        self._code = 130 if interrupted else 1
        self._peers.fail("was interrupted" if interrupted else _describe(kind, error))
        self._hook(kind, error, trace)

    def _on_exit(self, status: object = None, /) -> None:
        if threading.current_thread() is threading.main_thread():
            self._code = _exit_code(status)
        self._exit(status)  # pyright: ignore[reportArgumentType]

    def _at_exit(self) -> None:
        if self._code == 0 and not self._peers.has_failed:
            self._peers.close()
            return
        self._peers.fail(f"ended with exit code {self._code}")
        # JAX would now wait for the others, which are gone.
        logging.shutdown()
        _flush()
        os._exit(self._code or 1)


def _exit_code(status: object) -> int:
    if status is None:
        return 0
    return status & 0xFF if isinstance(status, int) else 1


def _describe(kind: type[BaseException], error: BaseException) -> str:
    text = " ".join(str(error).split())
    short = text if len(text) <= 300 else f"{text[:300]} …"
    return f"{kind.__name__}: {short}" if short else kind.__name__
