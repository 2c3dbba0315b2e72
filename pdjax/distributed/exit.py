"""How a process of a run ends: well, by its own failure, or because another is lost.

Python does not report at exit whether the program succeeded, so an uncaught exception is noted by
`sys.excepthook`, and the code of `sys.exit` by a wrapper around it. What remains unseen is a bare
``raise SystemExit(3)``, and ``sys.exit(main())`` where it is `main` that calls `initialize`, since
Python looks `sys.exit` up before: the others take it for a good end, unless they go on to a call
for which they need this process.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
from types import TracebackType

from pdjax.distributed.peers import Peers
from pdjax.distributed.signals import Signals

_LAST_WORDS_S = 1.0
_MAX_CHARACTERS = 300


def print_last(message: str) -> None:
    """Prints a message on standard error, from whatever thread, before `end_process`.

    A full pipe does not keep the process alive: it ends after a moment, with exit code 1, whatever
    blocks it.
    """
    # A thread of our own would do as well, but none can be started while Python shuts down.
    faulthandler.dump_traceback_later(_LAST_WORDS_S, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode(errors="replace"))
    _tidy()


def end_process(code: int = 1) -> None:
    """Ends the process at once, from whatever thread.

    The main thread may be blocked in a computation that waits for a lost process, and would never
    run another line of Python.
    """
    os._exit(code)


def _tidy() -> None:
    """The part of what Python does at exit that matters most."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if "multiprocessing" in sys.modules:  # else there are no children
        import multiprocessing

        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.terminate()


class EndOfProgram:
    """Sees how the program ends, and tells the others.

    Args:
        peers: the other processes.
        catch_sigterm: whether to end the program on SIGTERM, if it has no handler of its own.
    """

    def __init__(self, peers: Peers, catch_sigterm: bool) -> None:
        self._peers = peers
        self._signals = Signals(self._on_blocked, catch_sigterm)
        self._code = 0
        self._hook = sys.excepthook
        self._exit = sys.exit

    def watch(self) -> None:
        """Starts to look; ends with the program or with `forget`."""
        sys.excepthook = self._on_exception
        sys.exit = self._on_exit
        self._signals.catch()
        # Registered after JAX's own, so it runs before that waits for the others.
        atexit.register(self._at_exit)

    def forget(self) -> None:
        """Stops looking."""
        atexit.unregister(self._at_exit)
        self._signals.release()
        # A later wrapper of these keeps the function that it wrapped.
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._hook
        if sys.exit == self._on_exit:
            sys.exit = self._exit

    def _on_blocked(self, name: str, code: int) -> None:
        self._peers.leave(f"was ended by {name}")
        print_last(f"error: ended by {name}, while the main thread was blocked.")
        end_process(code)

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if hasattr(sys, "ps1"):
            pass  # at a prompt, where the program goes on
        elif issubclass(kind, KeyboardInterrupt):
            self._code = 128 + signal.SIGINT
            self._peers.leave("was ended by SIGINT")
        else:
            self._code = 1
            if not self._peers.loss_follows():
                self._report_and_leave(kind, error, trace)
                return
        self._hook(kind, error, trace)

    def _report_and_leave(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Prints the traceback, and then tells the others.

        As soon as one of them has ended, the launcher may end this one, too. But
        no process has to wait for a hook that takes its time, such as a debugger.
        """
        reason = f"failed: {_describe(kind, error)}"
        soon = threading.Timer(_LAST_WORDS_S, self._peers.leave, [reason])
        soon.daemon = True
        soon.start()
        self._hook(kind, error, trace)
        soon.cancel()
        soon.join()
        self._peers.leave(reason)

    def _on_exit(self, status: object = None, /) -> None:
        if threading.current_thread() is threading.main_thread():
            self._code = _exit_code(status)
        self._exit(status)  # pyright: ignore[reportArgumentType]

    def _at_exit(self) -> None:
        try:
            if self._code == 0 and not self._peers.has_failed:
                self._peers.close()
                return
            if self._code == 128 + signal.SIGTERM:
                self._peers.leave("was ended by SIGTERM")
            self._peers.fail(f"ended with exit code {self._code}")
        except (KeyboardInterrupt, SystemExit):  # while it waited for the others
            self._code = self._code or 128 + signal.SIGINT
        # JAX would now wait for the others, which are gone.
        logging.shutdown()
        _tidy()
        end_process(self._code or 1)


def _exit_code(status: object) -> int:
    if status is None:
        return 0
    return status & 0xFF if isinstance(status, int) else 1


def _describe(kind: type[BaseException], error: BaseException) -> str:
    text = " ".join(str(error).split()).removesuffix(".")  # in the middle of a sentence
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[:_MAX_CHARACTERS]} …"
    return f"{kind.__name__}: {text}" if text else kind.__name__
