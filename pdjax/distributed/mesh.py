"""The thread that hears all other processes, and finds out when one is lost.

It says every moment that it lives, and hears the others say so. A connection that breaks without a
goodbye, or one on which nothing is heard for too long, means that the process is lost. Nothing here
waits for the rest of the program, which may be blocked for ever by the loss.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence

from pdjax.distributed.exchanges import Exchanges
from pdjax.distributed.frames import ForeignError, Link, Message, encode
from pdjax.distributed.loss import Loss, Standing, explain, explain_given_up
from pdjax.distributed.members import Member
from pdjax.distributed.rendezvous import is_loopback

_BEATS = 10  # in the time after which a silent process is lost
_SILENT_PART = 0.7  # of that time; the rest is for telling the others, and for ending
_FAREWELL_S = 0.2


class Mesh:
    """The connections of this process to all others, and the thread that watches them.

    Args:
        members: all processes, in order.
        own_id: which of them this is.
        links: a link to each of the others; owned by the mesh from now on.
        on_lost: called with a message, from the mesh's thread, when a process is lost. The thread
            ends afterwards.

    Attributes:
        standings: what is known of each process.
        exchanges: what they tell each other in turn.
        address: the IP address by which others reach this process.
    """

    def __init__(
        self,
        members: Sequence[Member],
        own_id: int,
        links: Mapping[int, Link],
        on_lost: Callable[[str], None],
    ) -> None:
        self.standings = [Standing(str(member)) for member in members]
        self.exchanges = Exchanges(self.standings, own_id)
        self._own_id = own_id
        self._links = dict(links)
        self.address = _outermost([link.own_address for link in links.values()])
        self._on_lost = on_lost
        self._silence_s = members[own_id].lost_peer_timeout_s * _SILENT_PART
        # Everybody beats as often as the least patient expects.
        self._beat_s = min(member.lost_peer_timeout_s for member in members) / _BEATS
        self._changed = threading.Condition()
        self._outbox: list[bytes] = []
        self._drained = True
        self._deaf = False
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="pdjax-mesh", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        now = time.monotonic()
        for number, link in self._links.items():
            link.heard_at = now
            self._selector.register(link, selectors.EVENT_READ, number)
        _close_in_children(self)
        self._thread.start()

    def post(self, message: Message) -> None:
        """Tells all others something; returns at once.

        Raises:
            TypeError, ValueError: if JSON has no form for it.
        """
        frame = encode(message)
        with self._changed:
            self._outbox.append(frame)
            self._drained = False
        self._wake()

    def drain(self, timeout_s: float) -> bool:
        """Waits until all that was posted is on its way; returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._drained, timeout_s)

    def say_goodbye(self) -> None:
        """Tells the others that this process has ended well; what follows is no loss to them."""
        self.post({"goodbye": True})

    def wait_for_goodbyes(self) -> None:
        """Waits until all others have ended well, too, or the thread has ended."""
        others = [s for number, s in enumerate(self.standings) if number != self._own_id]
        with self._changed:
            self._changed.wait_for(
                lambda: all(s.has_ended for s in others) or not self._thread.is_alive()
            )

    def wait_for_end(self, timeout_s: float) -> bool:
        """Waits a moment for the thread to end because of a loss; returns whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def turn_deaf(self) -> None:
        """From now on the loss of another is of no interest, because this process ends itself."""
        self._deaf = True

    def stop(self) -> None:
        """Ends the thread, and closes all connections."""
        self._stopping = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def close_in_child(self) -> None:
        """In a forked child: lets go of the parent's connections.

        The others would otherwise hear of the parent's death only when the child ends, too.
        """
        self._stopping = True
        self._close()

    def _run(self) -> None:
        try:
            self._watch()
        except Exception:  # a silent end of the watch would be worse
            self._report(f"error: the watch over the other processes failed:\n{_traceback()}")
        finally:
            self.exchanges.end("this process has left the run.")
            with self._changed:
                self._drained = True
                self._changed.notify_all()
            self._close()

    def _watch(self) -> None:
        awake_at = beat_at = time.monotonic()
        while not self._stopping:
            if time.monotonic() >= beat_at:
                self._queue(encode({"alive": self.standings[self._own_id].num_minibatches}))
                beat_at = time.monotonic() + self._beat_s
            self._send()
            ready = self._selector.select(max(0.0, beat_at - time.monotonic()))
            now = time.monotonic()
            self._forgive(now - awake_at)
            awake_at = now
            loss = self._read(ready, now) or self._find_silent(now)
            if loss is not None and not self._deaf:
                self._lose(loss)
                return

    def _forgive(self, slept_s: float) -> None:
        """Whoever slept itself, stopped or starved, must not blame the others for silence."""
        if slept_s > 2 * self._beat_s:
            for link in self._links.values():
                link.heard_at += slept_s

    def _send(self) -> None:
        with self._changed:
            frames, self._outbox = self._outbox, []
        for frame in frames:
            self._queue(frame)
        waiting = False
        for number, link in self._links.items():
            link.flush()
            waiting = waiting or link.has_outgoing
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.has_outgoing else 0)
            if self._selector.get_key(link).events != events:
                self._selector.modify(link, events, number)
        with self._changed:
            if not waiting and not self._outbox:
                self._drained = True
                self._changed.notify_all()

    def _queue(self, frame: bytes) -> None:
        for link in self._links.values():
            link.send(frame)

    def _read(self, ready: Sequence[tuple[selectors.SelectorKey, int]], now: float) -> Loss | None:
        """Hears what has come; returns the first loss that it means."""
        for key, _ in ready:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._wake_reader.recv(1 << 12)
                continue
            # The word of a process that noticed a loss comes before the end of its own connection:
            # all name the first cause, not what followed from it.
            loss = self._read_link(key.data, now)
            if loss is not None:
                return loss
        return None

    def _read_link(self, number: int, now: float) -> Loss | None:
        link = self._links[number]
        try:
            messages = link.read(now)
        except ForeignError:
            return Loss(number, "sent what is no message of pdjax")
        for message in messages:
            loss = self._hear(number, message)
            if loss is not None:
                return loss
        return self._part(number) if link.ended is not None else None

    def _hear(self, number: int, message: Message) -> Loss | None:
        standing = self.standings[number]
        if "alive" in message:
            standing.num_minibatches = message["alive"]
        if "turn" in message:
            self.exchanges.hear(number, message)
        elif "stages" in message:
            standing.stages = str(message["stages"])
        elif "failed" in message:
            standing.num_minibatches = message["alive"]
            return Loss(number, str(message["failed"]))
        elif "lost" in message:
            return Loss.from_json(message, told_by=number)
        elif "goodbye" in message:
            standing.has_ended = True
            self.exchanges.look()
            with self._changed:
                self._changed.notify_all()
        return None

    def _part(self, number: int) -> Loss | None:
        link = self._links.pop(number)
        self._selector.unregister(link)
        link.close()
        if self.standings[number].has_ended:
            return None
        return Loss(
            number,
            f"broke its connection without a goodbye ({link.ended}): it was killed, or crashed",
        )

    def _find_silent(self, now: float) -> Loss | None:
        for number, link in self._links.items():
            silent_s = now - link.heard_at
            if silent_s > self._silence_s and not self.standings[number].has_ended:
                return Loss(
                    number,
                    f"was not heard for {silent_s:.1f} s: it hangs, is stopped, or its host or "
                    "network is down",
                )
        return None

    def _lose(self, loss: Loss) -> None:
        self._queue(encode(loss.to_json()))
        own = self.standings[self._own_id]
        if loss.process_id == self._own_id:
            text = explain_given_up(loss, own)
        else:
            text = explain(loss, self.standings[loss.process_id], own)
        self.exchanges.end(text)
        self._flush_all()
        self._report(text)

    def _flush_all(self) -> None:
        end = time.monotonic() + _FAREWELL_S
        while any(link.has_outgoing for link in self._links.values()) and time.monotonic() < end:
            time.sleep(0.001)
            for link in self._links.values():
                link.flush()

    def _report(self, text: str) -> None:
        if not self._deaf:
            self._on_lost(text)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody to wake
            self._wake_writer.send(b".")

    def _close(self) -> None:
        self._selector.close()
        for link in self._links.values():
            link.close()
        self._wake_reader.close()
        self._wake_writer.close()


def _close_in_children(mesh: Mesh) -> None:
    reference = weakref.ref(mesh)

    def close() -> None:
        found = reference()
        if found is not None:
            found.close_in_child()

    os.register_at_fork(after_in_child=close)


def _traceback() -> str:
    return traceback.format_exc()


def _outermost(addresses: Sequence[str]) -> str:
    """Of the addresses of a host's own ends one that other hosts reach, if there is one."""
    plain = [address.removeprefix("::ffff:") for address in addresses]
    outer = [address for address in plain if address and not is_loopback(address)]
    return outer[0] if outer else "127.0.0.1"
