"""The processes of a run, as one of them sees the others."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from pdjax.distributed.connections import Connections
from pdjax.distributed.heartbeat import Heartbeat
from pdjax.distributed.members import Member
from pdjax.errors import ClusterError

_FOLLOW_UP_S = 0.5


class Peers:
    """All processes of a run; made by `pdjax.distributed.initialize`.

    While it stands, a process that is killed, fails, is stopped or cannot be reached ends all
    others within `lost_peer_timeout_s`, with a message on standard error and exit code 1; see
    `initialize` for what else does. May be used from several threads.

    Attributes:
        process_id: which process this is, from 0.
        num_processes: how many there are.
        hosts: for each process, the name of its host.
        address: the IP address by which the others reach this process.
        has_failed: whether this process has informed the others that it ends early.
    """

    def __init__(
        self, members: Sequence[Member], own_id: int, connections: Connections, heartbeat: Heartbeat
    ) -> None:
        self.process_id = own_id
        self.num_processes = len(members)
        self.hosts = tuple(member.host for member in members)
        self.address = connections.address
        self.has_failed = False
        self._connections = connections
        self._heartbeat = heartbeat
        self._standing = connections.standings[own_id]
        self._to_finish: list[Callable[[], None]] = []
        self._turn = 0
        self._turns = threading.Lock()
        self._closed = False
        self._closing = threading.Lock()

    def exchange(self, about: str, value: Any) -> list[Any]:
        """Tells all processes a value; waits for theirs; returns all, in order of process.

        The n-th call of each process meets the n-th of every other, so all must make the same calls
        in the same order. It is a barrier.

        Args:
            about: what is exchanged, for messages; it must be the same everywhere.
            value: anything that JSON has a form for; tuples come back as lists.

        Raises:
            ValueError: if JSON has no form for the value, or it is longer than 64 MiB.
            ClusterError: if the processes are at different calls, or one of them has ended.
        """
        if self._closed:
            raise ClusterError(f"cannot exchange {about!r}: this process has left the run.")
        try:
            plain = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"cannot exchange {about!r}: expected what JSON has a form for, such as numbers, "
                f"texts, lists and dictionaries with texts as keys ({error})."
            ) from error
        with self._turns:
            turn = self._turn
            message = {"kind": "value", "turn": turn, "about": about, "value": plain}
            self._connections.post(message)
            self._turn += 1
            self._connections.exchanges.receive(self.process_id, message)
            return self._connections.exchanges.wait(turn, about)

    def describe(self, stages: str) -> None:
        """Says what this process runs, for the messages of the others if it is lost.

        Args:
            stages: such as "stage 1: block_2 … head".
        """
        self._standing.stages = stages
        self._connections.post({"kind": "stages", "stages": stages})

    def taking_part(self, call: str) -> AbstractContextManager[None]:
        """Surrounds a call that every process must make, and that waits for the others.

        If one of them ends, though well, before it has made as many, it counts as lost, so that no
        process waits for it without end.

        Args:
            call: the name of the method of `Pipeline`.

        Raises:
            ClusterError: if that is known before the call.
        """
        return self._connections.calls.counting(call)

    def completed(self, num_minibatches: int) -> None:
        """Says how many minibatches this process has completed; costs next to nothing."""
        self._standing.num_minibatches = num_minibatches

    def ended(self) -> dict[int, int | None]:
        """The other processes that have ended well, and how many minibatches each had completed.

        Nothing can be computed together with them any more. None stands for one that never said.
        """
        return {
            number: standing.num_minibatches
            for number, standing in enumerate(self._connections.standings)
            if standing.has_ended
        }

    def finish_first(self, wait: Callable[[], None]) -> None:
        """Has `close` wait for something before it says goodbye.

        Args:
            wait: returns when it is done; given again it is not called twice.
        """
        if wait not in self._to_finish:
            self._to_finish.append(wait)

    def loss_follows(self) -> bool:
        """Waits a moment for the loss of another process that may have made this one fail.

        The message about that one then ends this process.
        """
        return not self._closed and self._connections.wait_for_end(_FOLLOW_UP_S)

    def fail(self, reason: str) -> None:
        """Tells the others that this process ends before its time, so that they end, too.

        If it is the loss of another process that made this one fail, the message about that one
        ends this process here, as if `fail` had not been called.

        Args:
            reason: in words, such as "ValueError: the batch is empty".
        """
        self.leave(f"failed: {reason}", _FOLLOW_UP_S)

    def leave(self, reason: str, follow_up_s: float = 0.0) -> None:
        """As `fail`, in other words.

        Args:
            reason: in words that go on after the name of this process.
            follow_up_s: seconds to wait for the loss of another process from which this may follow.
        """
        if self._closed or self._connections.wait_for_end(follow_up_s):
            return
        with self._closing:
            if self._closed:
                return
            self._closed = self.has_failed = True
        self._connections.ignore_losses()
        self._connections.post({"kind": "failed", "reason": reason, **self._standing.known()})
        self._stop()

    def close(self) -> None:
        """Says goodbye: this process has done its part; then waits until all others have, too.

        A loss among those who still work ends this process, too, as long as it waits.
        """
        if not self._closed:
            for wait in self._to_finish:
                wait()
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._connections.post({"kind": "goodbye", "calls": self._connections.calls.made()})
        self._connections.wait_for_goodbyes()
        self._stop()

    def _stop(self) -> None:
        self._connections.stop()
        self._heartbeat.stop()
