"""What is known of a process, and what the others say when it is lost."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        return f"{self.who}, {self.stages}" if self.stages else self.who

    def progress(self) -> str:
        """How far it is, in words."""
        if self.num_minibatches is None:
            return "had not begun to train"
        if self.num_minibatches == 0:
            return "had completed no minibatch"
        return f"had completed minibatch {self.num_minibatches}"


@dataclass(frozen=True)
class Loss:
    """A process that is no longer there, though it did not say goodbye.

    Attributes:
        process_id: which one.
        reason: how that is known, in words that go on after its name.
        told_by: the process that found out; None if this one did.
    """

    process_id: int
    reason: str
    told_by: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As the others are told."""
        return {"lost": self.process_id, "reason": self.reason}

    @staticmethod
    def from_json(value: dict[str, Any], told_by: int) -> Loss:
        """What another process told."""
        return Loss(int(value["lost"]), str(value["reason"]), told_by)

    def told(self, by: int) -> Loss:
        """The same, found out by another process."""
        return replace(self, told_by=by)


def explain(loss: Loss, lost: Standing, own: Standing) -> str:
    """The message with which the process `own` ends."""
    noticed = "" if loss.told_by is None else f" (noticed by process {loss.told_by})"
    return (
        f"error: lost {lost}: it {loss.reason}{noticed}. It {lost.progress()}; "
        f"this {own} {own.progress()}. The run cannot go on without it, so this process ends, "
        "with exit code 1. The output of the lost one may say more."
    )


def explain_given_up(loss: Loss, own: Standing) -> str:
    """The message of a process that the others took for lost while it lives."""
    by = "the others" if loss.told_by is None else f"process {loss.told_by}"
    return (
        f"error: {by} gave up this {own}: it {loss.reason}. It {own.progress()}. "
        "The run has ended, so this process ends, too, with exit code 1."
    )
