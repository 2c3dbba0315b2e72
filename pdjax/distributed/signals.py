"""SIGINT and SIGTERM end a process also while its main thread is blocked.

Python runs the handlers of signals in the main thread, between two of its instructions. A main
thread that waits in a computation for another process does not come to that, so a thread of its own
looks whether the handler has run, and ends the process if it has not.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_REACT_S = 3.0


class Signals:
    """The signals that ask the process to end.

    SIGINT raises `KeyboardInterrupt`, as always, and SIGTERM `SystemExit`, unless the program
    handles them itself.

    Args:
        on_blocked: called with the signal's name and the exit code, from a thread, if the main
            thread does not react.
        catch_sigterm: whether SIGTERM is among them.
    """

    def __init__(self, on_blocked: Callable[[str, int], None], catch_sigterm: bool) -> None:
        self._on_blocked = on_blocked
        self._defaults: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler}
        if catch_sigterm:
            self._defaults[signal.SIGTERM] = signal.SIG_DFL
        self._caught: set[int] = set()
        self._handled_at = -_REACT_S

    def catch(self) -> None:
        """Starts to handle them; not outside the main thread, where Python forbids it."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, usual in self._defaults.items():
            if signal.getsignal(number) == usual:
                signal.signal(number, self._handle)
                self._caught.add(number)
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if before != -1:  # somebody else's, such as asyncio's, goes first
            signal.set_wakeup_fd(before)
        # A forked child would send what it gets to the thread of its parent.
        os.register_at_fork(after_in_child=self.release)
        threading.Thread(target=self._look, name="pdjax-signals", daemon=True).start()

    def release(self) -> None:
        """Stops handling them."""
        if not self._caught or threading.current_thread() is not threading.main_thread():
            return
        for number, usual in self._defaults.items():
            if number in self._caught and signal.getsignal(number) == self._handle:
                signal.signal(number, usual)
        self._caught.clear()
        before = signal.set_wakeup_fd(-1)
        if before not in (-1, self._writer.fileno()):
            signal.set_wakeup_fd(before)
        self._writer.close()  # which ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._handled_at = time.monotonic()
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        sys.exit(128 + number)

    def _look(self) -> None:
        with self._reader:
            while data := self._reader.recv(1):
                if data[0] in self._caught:
                    self._await_reaction(signal.Signals(data[0]))

    def _await_reaction(self, number: signal.Signals) -> None:
        came_at = time.monotonic()
        time.sleep(_REACT_S)
        # It may have run just before this thread heard of the signal; and since it was set the
        # program may have set one of its own.
        ran = self._handled_at >= came_at - _REACT_S
        if not ran and signal.getsignal(number) == self._handle:
            self._on_blocked(number.name, 128 + number)
