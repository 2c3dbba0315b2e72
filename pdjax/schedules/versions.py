"""Which versions of the weights a schedule reads and keeps under a weight rule.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdjax.schedules.columns import B, Columns, F, I, U, W
from pdjax.schedules.schedule import Action, Schedule
from pdjax.schedules.weight_rule import WeightRule


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
    columns = Columns.of([worker])
    changes = version_changes(columns, rule, num_microbatches, delay)[columns.stage == stage]
    return 1 + int(np.cumsum(changes).max(initial=0))


def version_changes(
    columns: Columns, rule: WeightRule, num_microbatches: int = 1, delay: int | None = None
) -> np.ndarray:
    """By how many each action changes the versions of its stage's weights on its worker.

    Alive are the newest one, those that a stash holds and those that a forward pass is yet to
    read. An update adds one. A version is gone
    after the last of these: the update that follows, the last backward pass that reads it, the
    last forward pass that reads it or an older one.

    Args:
        columns: a schedule written out, beginning with nothing in flight.
        rule: the rule.
        num_microbatches: microbatches in a minibatch.
        delay: what `delay_of` says.
    """
    changes = (columns.kind == U).astype(np.int64)
    place = columns.worker * (columns.stage.max(initial=0) + 1) + columns.stage
    sizes = np.bincount(place, weights=changes).astype(np.int64) + 1  # versions at each place
    first = np.cumsum(sizes) - sizes
    gone = np.full(int(sizes.sum()), -1)

    def until(at: np.ndarray, version: np.ndarray) -> None:
        slot = first[place[at]] + np.minimum(version, sizes[place[at]] - 1)
        np.maximum.at(gone, slot, at)

    newest = newest_versions(columns)
    if delay is not None:
        forwards = np.flatnonzero(columns.kind == F)
        until(forwards, np.maximum(columns.microbatch[forwards] // num_microbatches - delay, 0))
        for start, stop in zip(first, first + sizes, strict=True):
            np.maximum.accumulate(gone[start:stop], out=gone[start:stop])
    if rule.backward == "stashed":
        read = versions_read(columns, rule, num_microbatches, delay)
        last = np.isin(columns.kind[read.at], (B, W))
        until(read.at[last], read.forward[last])
    updates = np.flatnonzero(changes)
    until(updates, newest[updates])
    gone[first + sizes - 1] = -1  # the newest one stays
    np.subtract.at(changes, gone[gone >= 0], 1)
    return changes
