"""What is known of a process, and what the others say when it is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Standing:
    """What a process has said of itself.

    Attributes:
        who: its number, host and pid.
        stages: what it runs; empty until it said so.
        num_minibatches: how many it has completed; None until it said so.
        has_ended: whether it said goodbye.
    """

    who: str
    stages: str = ""
    num_minibatches: int | None = None
    has_ended: bool = False

    def __str__(self) -> str:
        return f"{self.who}, {self.stages}," if self.stages else self.who

    def known(self) -> dict[str, Any]:
        """What others may `learn`."""
        return {"stages": self.stages, "num_minibatches": self.num_minibatches}

    def learn(self, stages: str, num_minibatches: int | None) -> None:
        """Takes in what another knows, whose news may have come sooner."""
        self.stages = stages or self.stages
        if num_minibatches is not None:
            self.num_minibatches = max(num_minibatches, self.num_minibatches or 0)

    def progress(self) -> str:
        """How far it is, in words."""
        if self.num_minibatches is None:
            return "had not begun to train"
        if self.num_minibatches == 1:
            return "had completed 1 minibatch"
        return f"had completed {self.num_minibatches or 'no'} minibatches"


@dataclass(frozen=True)
class LostPeer:
    """A process that is no longer there, without a goodbye or while it is still needed.

    Attributes:
        process_id: which one.
        reason: how that is known, in words that go on after its name.
        told_by: the process that found out; None if this one did, or the lost one said it itself.
    """

    process_id: int
    reason: str
    told_by: int | None = None


def explain(loss: LostPeer, lost: Standing, own: Standing) -> str:
    """The message with which the process `own` ends."""
    noticed = "" if loss.told_by is None else f" (noticed by process {loss.told_by})"
    return (
        f"error: {lost} {loss.reason}{noticed}. It {lost.progress()}; this {own} "
        f"{own.progress()}. This process cannot go on without it and ends, with exit code 1. "
        "What the other one wrote may say more."
    )


def explain_given_up(loss: LostPeer, own: Standing) -> str:
    """The message of a process that the others took for lost while it lives."""
    by = "another process" if loss.told_by is None else f"process {loss.told_by}"
    return (
        f"error: this {own} was given up by {by}: it {loss.reason}. It {own.progress()}. The run "
        "is over, so this process ends, with exit code 1."
    )
