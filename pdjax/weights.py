"""Which version of the weights a pass reads.

The schedule says *when* a stage computes, the weight rule *with which weights*. Version v of a
stage's weights is what v updates have made of its initial weights, version 0. A rule is a value;
the validator, the memory count and the executor read the same one. Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the schedules themselves are made with the rules below
    from pdjax.schedules.schedule import Action


@dataclass(frozen=True)
class WeightRule:
    """Which version the two passes of a microbatch read on a stage.

    The forward pass reads the newest version.

    Attributes:
        name: the rule's name.
        backward: ``"newest"``: the backward pass reads the newest version, which must be the
            one that the forward pass read; ``"stashed"``: it reads the version that the forward
            pass read, kept until then.
    """

    name: str
    backward: Literal["newest", "stashed"]


LATEST = WeightRule("latest", backward="newest")
"""No version but the newest is kept: for schedules that finish a minibatch before its update."""

STASH = WeightRule("stash", backward="stashed")
"""Weight stashing (PipeDream, SOSP 2019, section 3.3): the backward pass of a microbatch uses the
weights of its forward pass, however many updates came in between."""


@dataclass(frozen=True)
class VersionsRead:
    """The versions that the two passes of a microbatch read on a stage.

    Attributes:
        stage: the stage.
        microbatch: the microbatch.
        forward: version read by the forward pass.
        backward: version read by the backward pass.
        staleness: updates between that version and the one that the gradient is applied to.
    """

    stage: int
    microbatch: int
    forward: int
    backward: int
    staleness: int


def versions_read(worker: Sequence[Action], rule: WeightRule) -> Iterator[VersionsRead]:
    """The versions that a worker's passes read, backward pass by backward pass."""
    newest: dict[int, int] = {}
    forward: dict[tuple[int, int], int] = {}
    for action in worker:
        stage, microbatch = action.stage, action.microbatch
        version = newest.setdefault(stage, 0)
        if action.kind == "U":
            newest[stage] += 1
        elif action.kind == "F":
            forward[stage, microbatch] = version
        elif (stage, microbatch) in forward:
            read = forward.pop((stage, microbatch))
            used = read if rule.backward == "stashed" else version
            yield VersionsRead(stage, microbatch, read, used, version - used)


def peak_in_flight(worker: Sequence[Action], stage: int) -> int:
    """The largest number of microbatches between their forward and their backward on `stage`."""
    steps = {"F": 1, "B": -1, "U": 0}
    count = peak = 0
    for action in worker:
        if action.stage == stage:
            count += steps[action.kind]
            peak = max(peak, count)
    return peak


def peak_versions(worker: Sequence[Action], stage: int, rule: WeightRule) -> int:
    """The largest number of versions of the weights of `stage` alive between two actions."""
    newest, peak = 0, 1
    stashed: dict[int, int] = {}
    for action in worker:
        if action.stage != stage:
            continue
        if action.kind == "U":
            newest += 1
        elif action.kind == "F":
            stashed[action.microbatch] = newest
        else:
            stashed.pop(action.microbatch, None)
        kept = set(stashed.values()) if rule.backward == "stashed" else set()
        peak = max(peak, len(kept | {newest}))
    return peak
