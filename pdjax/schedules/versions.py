"""Which versions of the weights a schedule reads and keeps under a weight rule.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdjax.schedules.columns import B, Columns, F, I, U, W
from pdjax.schedules.schedule import Action, Schedule
from pdjax.weights import WeightRule


def delay_of(rule: WeightRule, schedule: Schedule) -> int | None:
    """How many updates behind the forward passes of a minibatch are, once it is under way.

    Minibatch t, counted from the last drain, reads version ``max(0, t - delay)``. None if a
    forward pass reads whatever is newest.
    """
    if rule.forward == "newest":
        return None
    if rule.forward == "previous":
        return 1
    columns = schedule.unrolled(schedule.lag * schedule.num_minibatches + 2)
    first = np.flatnonzero((columns.stage == 0) & (columns.kind == F))
    behind = columns.microbatch // schedule.num_microbatches - newest_versions(columns)
    return int(behind[first].max(initial=0))


def newest_versions(columns: Columns) -> np.ndarray:
    """For each action the newest version of its stage on its worker, before the action."""
    by_stage = np.lexsort((np.arange(len(columns)), columns.stage, columns.worker))
    updates = (columns.kind == U)[by_stage].astype(np.int64)
    before = np.cumsum(updates) - updates
    place = columns.worker[by_stage] * (columns.stage.max(initial=0) + 1) + columns.stage[by_stage]
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    before -= np.repeat(before[starts], np.diff(starts, append=len(place)))
    found = np.empty(len(columns), np.int64)
    found[by_stage] = before
    return found


@dataclass(frozen=True, eq=False)
class VersionsRead:
    """The versions that passes read, one entry for each backward pass or weight part.

    Attributes:
        at: positions of these actions among those that were asked about.
        forward: version read by the forward pass of the microbatch.
        backward: version read by the pass.
        newest: version that the gradient is applied to, if the update follows at once.
        missing: whether the forward pass would read a version before it is made.
    """

    at: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    newest: np.ndarray
    missing: np.ndarray

    @property
    def staleness(self) -> np.ndarray:
        """Updates between the version read and the one that the gradient is applied to."""
        return self.newest - self.backward


def versions_read(
    columns: Columns, rule: WeightRule, num_microbatches: int = 1, delay: int | None = None
) -> VersionsRead:
    """The versions that passes read under a rule.

    Args:
        columns: a schedule written out, beginning with nothing in flight. Passes whose forward
            pass is missing or elsewhere are left out.
        rule: the rule.
        num_microbatches: microbatches in a minibatch.
        delay: what `delay_of` says.
    """
    newest = newest_versions(columns)
    forward = newest
    if delay is not None:
        forward = np.maximum(columns.microbatch // num_microbatches - delay, 0)
    span = columns.microbatch.max(initial=0) + 1
    slot = columns.stage * span + columns.microbatch
    where = np.full((columns.stage.max(initial=0) + 1) * span, -1)
    passes = np.flatnonzero(columns.kind == F)
    where[slot[passes]] = passes
    at = np.flatnonzero(np.isin(columns.kind, (B, I, W)))
    source = where[slot[at]]
    together = (source >= 0) & (columns.worker[source] == columns.worker[at])
    at, source = at[together], source[together]
    read = forward[source]
    return VersionsRead(
        at,
        read,
        read if rule.backward == "stashed" else newest[at],
        newest[at],
        read > newest[source],
    )


def peak_in_flight(worker: Sequence[Action], stage: int) -> int:
    """The largest number of microbatches between their forward and their backward on `stage`.

    Where the backward pass is divided, its input part counts.
    """
    steps = {"F": 1, "B": -1, "I": -1, "W": 0, "U": 0}
    count = peak = 0
    for action in worker:
        if action.stage == stage:
            count += steps[action.kind]
            peak = max(peak, count)
    return peak


def peak_versions(
    worker: Sequence[Action],
    stage: int,
    rule: WeightRule,
    num_microbatches: int = 1,
    delay: int | None = None,
) -> int:
    """The largest number of versions of the weights of `stage` alive between two actions.

    Args:
        worker: a worker's actions, written out.
        stage: one of its stages.
        rule: the rule.
        num_microbatches: microbatches in a minibatch.
        delay: what `delay_of` says.
    """
    return max(versions_alive(worker, stage, rule, num_microbatches, delay), default=1)


def versions_alive(
    worker: Sequence[Action],
    stage: int,
    rule: WeightRule,
    num_microbatches: int = 1,
    delay: int | None = None,
) -> list[int]:
    """After each action of a worker, how many versions of the weights of `stage` are alive.

    These are the newest, those that a stash holds and those that a forward pass is yet to read.
    """
    mine = [action for action in worker if action.stage == stage and action.kind == "F"]
    coming = [max(0, a.microbatch // num_microbatches - (delay or 0)) for a in mine]
    newest = num_forward = 0
    stashed: dict[int, int] = {}
    counts = []
    for action in worker:
        if action.stage == stage:
            if action.kind == "U":
                newest += 1
            elif action.kind == "F":
                stashed[action.microbatch] = newest if delay is None else coming[num_forward]
                num_forward += 1
            elif action.kind in ("B", "W"):
                stashed.pop(action.microbatch, None)
        kept = set(stashed.values()) if rule.backward == "stashed" else set()
        if delay is not None and num_forward < len(coming):
            kept |= set(range(coming[num_forward], newest))
        counts.append(len(kept | {newest}))
    return counts
