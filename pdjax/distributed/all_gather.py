"""What processes tell each other in turn: the n-th call here meets the n-th call everywhere."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from pdjax.distributed.frames import Message
from pdjax.distributed.lost_peer import Standing
from pdjax.errors import ClusterError


class AllGathers:
    """The values that have come, and those who wait for them.

    Args:
        standings: of all processes, in order.
    """

    def __init__(self, standings: Sequence[Standing]) -> None:
        self._standings = standings
        self._said: dict[int, dict[int, tuple[str, Any]]] = {}
        self._changed = threading.Condition()
        self._over: str | None = None

    def receive(self, process_id: int, message: Message) -> None:
        """Notes what a process says."""
        with self._changed:
            said = self._said.setdefault(int(message["turn"]), {})
            said[process_id] = str(message["about"]), message["value"]
            self._changed.notify_all()

    def end(self, reason: str) -> None:
        """No more values will come: waiting calls fail."""
        with self._changed:
            self._over = self._over or reason
            self._changed.notify_all()

    def look(self) -> None:
        """Who waits looks again whether all that are awaited still run."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, turn: int, about: str) -> list[Any]:
        """Waits for everybody's value; returns them in order of process.

        Raises:
            ClusterError: if they speak of different things, or one has ended or is lost.
        """
        with self._changed:
            while len(self._said.get(turn, {})) < len(self._standings):
                self._check(turn, about)
                self._changed.wait()
            said = self._said.pop(turn)
        subjects = [said[number][0] for number in range(len(self._standings))]
        if any(subject != about for subject in subjects):
            raise ClusterError(_disagreement(subjects))
        return [said[number][1] for number in range(len(self._standings))]

    def _check(self, turn: int, about: str) -> None:
        if self._over is not None:
            raise ClusterError(f"cannot exchange {about!r} with the other processes: {self._over}")
        came = self._said.get(turn, {})
        for number, standing in enumerate(self._standings):
            if standing.has_ended and number not in came:
                raise ClusterError(
                    f"cannot exchange {about!r} with the other processes: {standing} has ended "
                    "already. Do all processes run the same program, for as many steps?"
                )


def _disagreement(subjects: Sequence[str]) -> str:
    groups: dict[str, list[str]] = {}
    for number, subject in enumerate(subjects):
        groups.setdefault(subject, []).append(str(number))
    parts = [f"{subject!r} in process {', '.join(who)}" for subject, who in groups.items()]
    return (
        f"the processes are at different places of the program: {'; '.join(parts)}. "
        "All must make the same calls in the same order."
    )
