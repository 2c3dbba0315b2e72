"""Which versions of the weights a schedule reads and keeps under a weight rule.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdjax.column_table import ColumnTable
from pdjax.schedules.action import KINDS, Action
from pdjax.schedules.columns import Columns
from pdjax.schedules.schedule import Schedule
from pdjax.schedules.weight_rule import WeightRule


def delay_of(rule: WeightRule, schedule: Schedule) -> int | None:
    """By how many updates forward passes are behind, once a schedule is under way.

    Minibatch t, counted from the last drain, reads version ``max(0, t - delay)``. None if a
    forward pass reads whatever is newest.
    """
    if rule.forward == "newest":
        return None
    if rule.forward == "previous":
        return 1
    columns = schedule.unrolled(schedule.lag * schedule.num_minibatches + 2)
    first = np.flatnonzero((columns.stage == 0) & columns.reads("forward"))
    behind = columns.microbatch // schedule.num_microbatches - newest_versions(columns)
    return int(behind[first].max(initial=0))


def newest_versions(columns: Columns) -> np.ndarray:
    """For each action the newest version of its stage on its worker, before the action."""
    by_stage = np.lexsort((np.arange(len(columns)), columns.stage, columns.worker))
    updates = columns.makes("weights")[by_stage].astype(np.int64)
    before = np.cumsum(updates) - updates
    place = columns.worker[by_stage] * (columns.stage.max(initial=0) + 1) + columns.stage[by_stage]
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    before -= np.repeat(before[starts], np.diff(starts, append=len(place)))
    found = np.empty(len(columns), np.int64)
    found[by_stage] = before
    return found


@dataclass(frozen=True, eq=False)
class VersionsRead(ColumnTable):
    """The versions that passes read, one entry for each backward pass or weight part.

    Attributes:
        at: positions of these actions in the columns.
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
        delay: the delay by `delay_of`.
    """
    newest = newest_versions(columns)
    forward = newest
    if delay is not None:
        forward = np.maximum(columns.microbatch // num_microbatches - delay, 0)
    span = columns.microbatch.max(initial=0) + 1
    slot = columns.stage * span + columns.microbatch
    where = np.full((columns.stage.max(initial=0) + 1) * span, -1)
    passes = np.flatnonzero(columns.reads("forward"))
    where[slot[passes]] = passes
    at = np.flatnonzero(columns.reads("backward"))
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
    count = peak = 0
    for action in worker:
        if action.stage == stage:
            count += KINDS[action.kind].stash
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
        delay: the delay by `delay_of`.
    """
    columns = Columns.of([worker])
    changes = version_changes(columns, rule, num_microbatches, delay)[columns.stage == stage]
    return 1 + int(np.cumsum(changes).max(initial=0))


def version_changes(
    columns: Columns, rule: WeightRule, num_microbatches: int = 1, delay: int | None = None
) -> np.ndarray:
    """By how many each action changes the versions of its stage's weights on its worker.

    Alive are the newest version, the versions in a stash and the versions that a forward pass is
    yet to read. An update adds one. A version is gone after the last of these: the update that
    follows, the last backward pass that reads it, the last forward pass that reads it or an older
    one.

    Under weight stashing (PipeDream, SOSP 2019, section 3.3) with weights ``w(t+1) = w(t) -
    lr * grad f(w_0(t-n+1), ..., w_(n-1)(t))`` stage s keeps its n - s newest versions.

    Example:
        PipeDream with three stages and four minibatches: the versions of each stage after each
        action. Microbatches 0, 1 and 2 read version 0 of stage 0, so that it has three versions
        after its second update. Version 0 goes with the last backward pass that reads it, version
        2 with the update that follows, as no pass reads it.

        >>> from pdjax.schedules import pipedream
        >>> from pdjax.schedules.weight_rule import STASH
        >>> columns = pipedream(3).unrolled(4)
        >>> changes = version_changes(columns, STASH)
        >>> for start, row in zip(columns.starts, columns.rows()):
        ...     alive = 1 + np.cumsum(changes[start:])
        ...     print(*(f"{kind}{b}:{count}" for (kind, _, b), count in zip(row, alive)))
        F0:1 F1:1 F2:1 B0:1 U0:2 F3:2 B1:2 U1:3 B2:2 U2:2 B3:1 U3:1
        F0:1 F1:1 B0:1 U0:2 F2:2 B1:1 U1:2 F3:2 B2:1 U2:2 B3:1 U3:1
        F0:1 B0:1 U0:1 F1:1 B1:1 U1:1 F2:1 B2:1 U2:1 F3:1 B3:1 U3:1

    Args:
        columns: a schedule written out, beginning with nothing in flight.
        rule: the rule.
        num_microbatches: microbatches in a minibatch.
        delay: the delay by `delay_of`.

    Returns:
        An array of shape (len(columns),).
    """
    # 1. A slot for each version of each stage on each worker (its place). Version v of place p is
    #    slot first[p] + v; `sizes` and `first` have shape (num_places,).
    changes = columns.makes("weights").astype(np.int64)
    place = columns.worker * (columns.stage.max(initial=0) + 1) + columns.stage
    sizes = np.bincount(place, weights=changes).astype(np.int64) + 1
    first = np.cumsum(sizes) - sizes
    # 2. For each slot the last action that keeps it alive; shape (sizes.sum(),).
    last = np.full(int(sizes.sum()), -1)

    def keep(at: np.ndarray, version: np.ndarray) -> None:
        slot = first[place[at]] + np.minimum(version, sizes[place[at]] - 1)
        np.maximum.at(last, slot, at)

    # 2a. A forward pass keeps the version that it reads and, as the next ones read no older one,
    #     all versions from there on.
    newest = newest_versions(columns)
    if delay is not None:
        forwards = np.flatnonzero(columns.reads("forward"))
        keep(forwards, np.maximum(columns.microbatch[forwards] // num_microbatches - delay, 0))
        for start, stop in zip(first, first + sizes, strict=True):
            np.maximum.accumulate(last[start:stop], out=last[start:stop])
    # 2b. A backward pass keeps the version that its forward pass read.
    if rule.backward == "stashed":
        read = versions_read(columns, rule, num_microbatches, delay)
        keep(read.at, read.forward)
    # 2c. An update keeps the version that it replaces.
    updates = np.flatnonzero(changes)
    keep(updates, newest[updates])
    # 3. After its last action a version is gone; the newest one of each place stays.
    last[first + sizes - 1] = -1
    np.subtract.at(changes, last[last >= 0], 1)
    return changes
