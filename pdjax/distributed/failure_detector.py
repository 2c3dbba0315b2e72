"""When a process that says nothing is taken for lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pdjax.distributed.frames import Link
from pdjax.distributed.lost_peer import LostPeer
from pdjax.distributed.members import Member

_BEATS = 20  # in the time within which a loss ends the others
_SILENT_PART = 0.7  # of that time; the rest is for telling the others, and for ending
_PATIENCE = 12  # times as long a process may run no Python, if its heartbeat arrives


def heartbeat_seconds(members: Sequence[Member]) -> float:
    """The time between two signs of life: everybody's, as the least patient expects."""
    return min(member.lost_peer_timeout_s for member in members) / _BEATS


class FailureDetector:
    """Judges by what was heard when.

    Args:
        own: the process that listens.
    """

    def __init__(self, own: Member) -> None:
        self._own = own
        self._limit_s = own.lost_peer_timeout_s * _SILENT_PART

    def find_lost(
        self, links: Mapping[int, Link], heartbeats: Mapping[int, Link], now: float
    ) -> LostPeer | None:
        """The first process that was silent for too long.

        Args:
            links: for each process that is to be heard, where it speaks.
            heartbeats: for some of them, where their heartbeat is felt.
            now: the time.
        """
        lifeless_s = {
            number: now
            - max(link.heard_at, heartbeats[number].heard_at if number in heartbeats else 0.0)
            for number, link in links.items()
        }
        for number, link in links.items():
            if lifeless_s[number] > self._limit_s:
                reason = f"was not heard for {lifeless_s[number]:.1f} s: {self._why(lifeless_s)}"
                return LostPeer(number, reason)
            silent_s = now - link.heard_at
            if silent_s > self._own.lost_peer_timeout_s * _PATIENCE:
                return LostPeer(number, f"hangs: it has run no Python for {silent_s:.0f} s")
        return None

    def _why(self, lifeless_s: Mapping[int, float]) -> str:
        # Those who fell silent at the same moment were last heard at slightly different ones.
        if len(lifeless_s) > 1 and min(lifeless_s.values()) > self._limit_s / 2:
            return (
                f"nor was any other by process {self._own.process_id}, so its own host "
                f"{self._own.host} may be cut off"
            )
        return "it hangs or is stopped, or its host or the network is down"
