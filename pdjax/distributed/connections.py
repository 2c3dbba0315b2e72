"""The thread that hears all other processes, and finds out when one is lost.

Again and again it says that this process lives, and hears the others say so. A connection that
breaks without a goodbye, or one on which nothing is heard for too long, means that a process is
lost. Nothing here waits for the rest of the program, which the loss may have blocked for good.
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
from dataclasses import asdict
from functools import partial

from pdjax.distributed.acceptor import Acceptor
from pdjax.distributed.all_gather import AllGathers
from pdjax.distributed.failure_detector import FailureDetector, heartbeat_seconds
from pdjax.distributed.frames import ForeignError, Link, Message, encode
from pdjax.distributed.lockstep import Lockstep
from pdjax.distributed.lost_peer import LostPeer, Standing, explain, explain_given_up
from pdjax.distributed.members import Member
from pdjax.distributed.rendezvous import is_loopback

_TELL_S = 0.2
_FAREWELL_S = 1.0
_POLL_S = 0.002


class Connections:
    """The connections of this process to all others, and the thread that watches them.

    Args:
        members: all processes, in order.
        own_id: which of them this is.
        links: a link to each of the others; owned by the connections from now on.
        acceptor: where the heartbeats of the others come in; owned by the connections from now on.
        on_lost: called with a message, from the thread of the connections, when a process is lost.
        on_end: called afterwards, when the others have been informed. The thread ends then.

    Attributes:
        standings: what is known of each process.
        exchanges: what they tell each other in turn.
        calls: what all of them take part in.
        address: the IP address by which others reach this process.
    """

    def __init__(
        self,
        members: Sequence[Member],
        own_id: int,
        links: Mapping[int, Link],
        acceptor: Acceptor,
        on_lost: Callable[[str], None],
        on_end: Callable[[], None],
    ) -> None:
        self.standings = [Standing(str(member)) for member in members]
        self.exchanges = AllGathers(self.standings)
        self.calls = Lockstep(self.standings, own_id)
        self._own_id = own_id
        self._links = dict(links)
        self.address = _outermost([link.own_address for link in links.values()])
        self._acceptor = acceptor
        self._heartbeats: dict[int, Link] = {}
        self._on_lost = on_lost
        self._on_end = on_end
        self._failure_detector = FailureDetector(members[own_id])
        self._beat_s = heartbeat_seconds(members)
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._over = False
        self._deaf = False
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="pdjax-connections", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._drain_wake)
        self._selector.register(self._acceptor, selectors.EVENT_READ, self._admit)
        now = time.monotonic()
        for number, link in self._links.items():
            link.heard_at = now
            self._selector.register(link, selectors.EVENT_READ, partial(self._read_link, number))
        self._admit(now)
        _close_in_children(self)
        self._thread.start()

    def post(self, message: Message) -> None:
        """Tells all others something; returns at once.

        Args:
            message: its "kind" is one of those that `_receive` knows.

        Raises:
            TypeError, ValueError: if JSON has no form for it, or it is too long.
        """
        # Sent from this thread: the thread of the connections may not run for long if this one
        # keeps the interpreter lock. So is the status of this process.
        self._send_to_all(self._status_frame() + encode(message))
        self._wake()

    def wait_for_goodbyes(self) -> None:
        """Waits until all others have ended well, or the thread has ended."""
        others = [s for number, s in enumerate(self.standings) if number != self._own_id]
        with self._changed:
            self._changed.wait_for(lambda: self._over or all(s.has_ended for s in others))

    def wait_for_end(self, timeout_s: float) -> bool:
        """Waits a moment for the thread to end because of a loss; returns whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def ignore_losses(self) -> None:
        """From now on the loss of another is of no interest, because this process ends itself."""
        self._deaf = True

    def stop(self) -> None:
        """Ends the thread, and closes all connections once all that was posted is sent."""
        self._stopping = True
        self._wake()
        self._thread.join()

    def close_in_child(self) -> None:
        """In a forked child: lets go of the parent's connections.

        The others would otherwise learn of the parent's death only when the child ends, too.
        """
        self._stopping = self._over = True
        self._close()

    def _run(self) -> None:
        text = None
        try:
            text = self._watch()
        except Exception:  # a silent end of the watch would be worse
            text = "error: the watch over the other processes failed:\n" + traceback.format_exc()
        try:
            if text is not None and not self._deaf:
                self._on_lost(text)
                self._leave_in_order(_TELL_S)
                self._on_end()
            else:
                self._leave_in_order(_FAREWELL_S)
        finally:
            self.exchanges.end(text or "this process has left the run.")
            with self._changed:
                self._over = True
                self._changed.notify_all()
            self._close()

    def _watch(self) -> str | None:
        """Watches until it is stopped, or until a process is lost: then returns the message."""
        awake_at = beat_at = time.monotonic()
        while not self._stopping:
            if time.monotonic() >= beat_at:
                self._send_to_all(self._status_frame())
                beat_at = time.monotonic() + self._beat_s
            self._flush()
            ready = self._selector.select(max(0.0, beat_at - time.monotonic()))
            now = time.monotonic()
            self._excuse(now - awake_at, now)
            awake_at = now
            heard = (key.data(now) for key, _ in ready)
            loss = next(filter(None, heard), None) or self._find_unresponsive(now)
            if loss is not None and not self._deaf:
                return self._lose(loss)
        return None

    def _excuse(self, slept_s: float, now: float) -> None:
        """A process that was itself stopped or starved must not take the others for lost."""
        if slept_s > 2 * self._beat_s:
            for link in (*self._links.values(), *self._heartbeats.values()):
                link.heard_at = min(link.heard_at + slept_s, now)

    def _status_frame(self) -> bytes:
        completed = self.standings[self._own_id].num_minibatches
        return encode({"kind": "alive", "num_minibatches": completed})

    def _send_to_all(self, frame: bytes) -> None:
        with self._sending:
            for link in self._links.values():
                link.send(frame)

    def _flush(self) -> None:
        """Sends what could not be sent before, as far as that goes now."""
        for link in self._links.values():
            with self._sending:
                link.flush()
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.has_outgoing else 0)
            key = self._selector.get_key(link)
            if key.events != events:
                self._selector.modify(link, events, key.data)

    def _drain_wake(self, now: float) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(1 << 12)

    def _admit(self, now: float) -> None:
        for _, link in self._acceptor.admit(0.0):
            link.close()  # all are there
        while self._acceptor.heartbeats:
            number, link = self._acceptor.heartbeats.popitem()
            self._heartbeats[number] = link
            self._selector.register(link, selectors.EVENT_READ, partial(self._sense, link))
        if len(self._heartbeats) == len(self.standings) - 1:
            self._selector.unregister(self._acceptor)
            self._acceptor.close()

    def _sense(self, link: Link, now: float) -> None:
        """Receives the heartbeat of a process."""
        link.skim(now)
        if link.ended is not None:
            self._selector.unregister(link)
            link.close()

    def _read_link(self, number: int, now: float) -> LostPeer | None:
        link = self._links[number]
        try:
            messages = link.read(now)
        except ForeignError:
            return LostPeer(number, "sent what is no message of pdjax")
        # What a process says of a loss comes before the end of its own connection, which follows
        # from the loss: so all name the first cause.
        for message in messages:
            loss = self._receive(number, message)
            if loss is not None:
                return loss
        return self._leave(number) if link.ended is not None else None

    def _receive(self, number: int, message: Message) -> LostPeer | None:
        standing = self.standings[number]
        match message["kind"]:
            case "alive":
                standing.num_minibatches = message["num_minibatches"]
            case "value":
                self.exchanges.receive(number, message)
            case "stages":
                standing.stages = message["stages"]
            case "lost":
                lost = self.standings[message["process_id"]]
                lost.learn(message["stages"], message["num_minibatches"])
                return LostPeer(message["process_id"], message["reason"], told_by=number)
            case "failed":
                standing.learn(message["stages"], message["num_minibatches"])
                return LostPeer(number, message["reason"])
            case "goodbye":
                return self._receive_goodbye(number, message["calls"])
        return None

    def _receive_goodbye(self, number: int, calls: Mapping[str, int]) -> LostPeer | None:
        self.standings[number].has_ended = True
        self.exchanges.look()
        with self._changed:
            self._changed.notify_all()
        parted = self.calls.end(number, calls)
        return None if parted is None else LostPeer(number, parted)

    def _leave(self, number: int) -> LostPeer | None:
        with self._sending:
            link = self._links.pop(number)
            self._selector.unregister(link)
            link.close()
        if self.standings[number].has_ended:
            return None
        return LostPeer(number, f"was killed or crashed: its connection ended ({link.ended})")

    def _leave_in_order(self, timeout_s: float) -> None:
        """Sends what is left, and waits a moment until the others have closed their ends, too.

        A connection that is closed while something unread has come is reset, and the last words
        may be lost with it.
        """
        end = time.monotonic() + timeout_s
        while self._links and time.monotonic() < end:
            for number, link in list(self._links.items()):
                with self._sending:
                    link.flush()
                    if not link.has_outgoing:
                        link.finish()
                link.skim(0.0)
                if link.ended is not None:
                    self._leave(number)
            time.sleep(_POLL_S)

    def _find_unresponsive(self, now: float) -> LostPeer | None:
        awaited = {
            number: link
            for number, link in self._links.items()
            if not self.standings[number].has_ended
        }
        return self._failure_detector.find_lost(awaited, self._heartbeats, now)

    def _lose(self, loss: LostPeer) -> str:
        """Tells the others; returns the message for this process."""
        lost = self.standings[loss.process_id]
        self._send_to_all(encode({"kind": "lost", **asdict(loss), **lost.known()}))
        own = self.standings[self._own_id]
        if loss.process_id == self._own_id:
            return explain_given_up(loss, own)
        return explain(loss, lost, own)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: no thread to wake
            self._wake_writer.send(b".")

    def _close(self) -> None:
        self._selector.close()
        for link in (*self._links.values(), *self._heartbeats.values()):
            link.close()
        self._acceptor.close()
        self._wake_reader.close()
        self._wake_writer.close()


def _close_in_children(connections: Connections) -> None:
    reference = weakref.ref(connections)

    def close() -> None:
        found = reference()
        if found is not None:
            found.close_in_child()

    os.register_at_fork(after_in_child=close)


def _outermost(addresses: Sequence[str]) -> str:
    """Of the addresses of a host's own ends one that other hosts reach, if there is one."""
    plain = [address.removeprefix("::ffff:") for address in addresses]
    outer = [address for address in plain if address and not is_loopback(address)]
    return outer[0] if outer else "127.0.0.1"
