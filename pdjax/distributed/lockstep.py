"""What all processes take part in, and whether one has ended that is needed for it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from pdjax.distributed.lost_peer import Standing
from pdjax.errors import ClusterError


class Lockstep:
    """How often this process has made each call that every process must make equally often.

    A process that makes one more than a process that has ended would wait without end, for values
    that the other was to send or to fetch.

    Args:
        standings: of all processes, in order.
        own_id: which of them this is.
    """

    def __init__(self, standings: Sequence[Standing], own_id: int) -> None:
        self._standings = standings
        self._own_id = own_id
        self._counts: Counter[str] = Counter()
        self._final: dict[int, Mapping[str, int]] = {}
        # Of a call that begins and a goodbye that comes, the later one sees the other.
        self._lock = threading.Lock()

    @contextmanager
    def counting(self, call: str) -> Iterator[None]:
        """Counts a call from its beginning on, unless it fails.

        Raises:
            ClusterError: if a process has ended that does not make it.
        """
        with self._lock:
            number = self._counts[call] + 1
            for process_id, final in self._final.items():
                if number > final.get(call, 0):
                    parted = self._missed_calls(call, number, final)
                    raise ClusterError(f"{self._standings[process_id]} {parted}.")
            self._counts[call] = number
        try:
            yield
        except BaseException:
            with self._lock:
                self._counts[call] -= 1
            raise

    def made(self) -> dict[str, int]:
        """How often each call was made here."""
        with self._lock:
            return dict(self._counts)

    def end(self, process_id: int, final: Mapping[str, int]) -> str | None:
        """Notes that a process has ended, after so many of each call.

        Returns:
            If this process has made more of them, what went wrong, in words that go on after the
            name of the other one; else None.
        """
        with self._lock:
            self._final[process_id] = final
            for call, number in self._counts.items():
                if number > final.get(call, 0):
                    return self._missed_calls(call, number, final)
        return None

    def _missed_calls(self, call: str, number: int, final: Mapping[str, int]) -> str:
        made = final.get(call, 0)
        calls = f"{made or 'no'} call{'s' * (made != 1)} of Pipeline.{call}"
        return (
            f"has ended after {calls}, while process {self._own_id} is at call {number}; all must "
            "make the same calls, so give every process the same number of batches"
        )
