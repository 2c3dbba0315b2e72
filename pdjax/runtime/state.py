"""What a run of a pipeline holds between programs, in three parts for each replica.

lasting    weights, optimizer state, mutable state: all that a checkpoint would need
in flight  what waits for actions to come: activations, stash, cotangents, gradients
counters   how much was done and held; nothing is computed from them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from pdjax.runtime.inputs import Given
from pdjax.runtime.listing import Listing
from pdjax.runtime.metrics import Results
from pdjax.schedules.lower import ProgramKind
from pdjax.split.stages import StageSplit
from pdjax.trace.jit import Values


class Programs(Protocol):
    """All that is compiled for batches of one shape, for training or for evaluation.

    Attributes:
        split: the loss function, cut into stages.
        listing: what this process does with every minibatch.
        results: puts a minibatch's loss and metrics together.
    """

    split: StageSplit
    results: Results

    @property
    def listing(self) -> Listing:
        """See above."""
        ...


class Kept(NamedTuple):
    """What a stage keeps of a microbatch until its backward pass, or one of its parts.

    Attributes:
        version: the version of the weights that the forward pass read.
        weights: that version; None if the newest will do.
        given: what else of the inputs is read then.
        values: the activations; for the weight part what it reads of them, and what the input part
            held for it.
    """

    version: int
    weights: Values | None
    given: Given
    values: Values


@dataclass(slots=True)
class LastingState:
    """What a replica has from step to step.

    Attributes:
        weights: the newest version of its parameters.
        optimizer: its part of the optimizer state.
        model: its leaves of the mutable state, by index.
        version: number of updates applied.
    """

    weights: Values
    optimizer: Values
    model: dict[int, Any]
    version: int = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of one version of the weights."""
        return sum(leaf.nbytes for leaf in self.weights)


@dataclass(slots=True)
class InFlight:
    """What a replica holds for actions to come; nothing of it after a drain.

    Attributes:
        version_at_drain: the version of the weights at the last drain.
        oldest_read: the oldest version that a forward pass may yet read.
        old_versions: versions before the newest that a forward pass is yet to read.
        gradients: for each update to come, by its number since the last drain, the sum of its
            gradients so far; None for those of which there is none.
        activations: inbox of the forward passes.
        cotangents: inbox of the backward passes.
        stash: what is kept for each microbatch in flight.
        pending: what is kept for each microbatch whose weight gradient is pending.
        new_model: new values of the mutable state, where they are averaged over a minibatch.
        packs: for each phase of an update what other stages sent after it, by stage.
    """

    version_at_drain: int = 0
    oldest_read: int = 0
    old_versions: dict[int, Values] = field(default_factory=dict)
    gradients: dict[int, Any] = field(default_factory=dict)
    activations: dict[int, Any] = field(default_factory=dict)
    cotangents: dict[int, Any] = field(default_factory=dict)
    stash: dict[int, Kept] = field(default_factory=dict)
    pending: dict[int, Kept] = field(default_factory=dict)
    new_model: list[Values] = field(default_factory=list)
    packs: dict[int, dict[int, Any]] = field(default_factory=dict)

    def retire(self) -> None:
        """Lets go of the versions that no forward pass will read any more."""
        for version in [v for v in self.old_versions if v < self.oldest_read]:
            del self.old_versions[version]

    def versions(self, newest: int) -> set[int]:
        """The versions of the weights that are alive."""
        alive = {entry.version for entry in self.stash.values()}
        alive.update(entry.version for entry in self.pending.values())
        alive.update(self.old_versions, (newest,))
        return alive

    def restart(self, version: int) -> None:
        """Begins to count versions at the newest one, as a drain does."""
        self.version_at_drain = self.oldest_read = version
        self.old_versions.clear()


@dataclass(slots=True)
class StageCounters:
    """What a replica did and held, counted.

    Attributes:
        weight_bytes: bytes of one version of its weights.
        performed: how many programs of each kind were dispatched.
        num_versions: how many versions of the weights are alive.
        peak_versions: the most versions of the weights that were alive at once.
        stash_bytes: bytes that wait for backward passes, or for their weight parts.
        peak_stash_bytes: the most that these were.
        peak_in_flight: the most microbatches that were in flight at once.
    """

    weight_bytes: int = 0
    performed: Counter[ProgramKind] = field(default_factory=Counter)
    num_versions: int = 1
    peak_versions: int = 1
    stash_bytes: int = 0
    peak_stash_bytes: int = 0
    peak_in_flight: int = 0

    def add_stash(self, num_bytes: int) -> None:
        """Counts bytes that came to the stash, or, if negative, went."""
        self.stash_bytes += num_bytes
        self.peak_stash_bytes = max(self.peak_stash_bytes, self.stash_bytes)

    def set_versions(self, number: int) -> int:
        """Counts the versions that are alive; returns by how many bytes they are more."""
        more, self.num_versions = number - self.num_versions, number
        self.peak_versions = max(self.peak_versions, number)
        return more * self.weight_bytes


@dataclass
class StageState:
    """What a replica holds.

    Attributes:
        lasting: weights, optimizer state, mutable state.
        in_flight: what waits for actions to come.
        counters: what was counted.
    """

    lasting: LastingState
    in_flight: InFlight = field(default_factory=InFlight)
    counters: StageCounters = field(default_factory=StageCounters)

    def __post_init__(self) -> None:
        self.counters.weight_bytes = self.lasting.weight_bytes


@dataclass
class WorkerTally:
    """What a worker holds, counted.

    Attributes:
        version_bytes: bytes of all versions of the weights of its stages.
        stash_bytes: bytes that wait for backward passes or their weight parts.
        peak_bytes: the most that both were together.
    """

    version_bytes: int
    stash_bytes: int = 0
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.peak_bytes = self.version_bytes

    def add(self, version_bytes: int, stash_bytes: int) -> None:
        """Counts bytes that came, or, if negative, went."""
        self.version_bytes += version_bytes
        self.stash_bytes += stash_bytes
        self.peak_bytes = max(self.peak_bytes, self.version_bytes + self.stash_bytes)


@dataclass
class Run:
    """What an executor's run holds between steps.

    Attributes:
        stages: what each replica holds, stage after stage.
        workers: what each worker holds, counted.
        worker_of: for each replica its worker.
        num_microbatches_seen: microbatches handed over so far; the next one gets this number.
        start: the first microbatch after the last drain.
        passes: the programs of the last minibatch.
        passes_of: the programs of each minibatch in flight, by its first microbatch.
        divisors: for each minibatch not yet applied everywhere, by its first microbatch, the
            array that its gradients are divided by (only for weighted losses).
        sent_bytes: bytes that each replica sent to each other, by (from, to).
    """

    stages: list[StageState]
    workers: list[WorkerTally]
    worker_of: tuple[int, ...]
    num_microbatches_seen: int = 0
    start: int = 0
    passes: Programs | None = None
    passes_of: dict[int, Programs] = field(default_factory=dict)
    divisors: dict[int, Any] = field(default_factory=dict)
    sent_bytes: Counter[tuple[int, int]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Feed:
    """What a step hands to the stages.

    Attributes:
        passes: the programs for minibatches of this shape.
        batch: for each replica and microbatch its batch leaves; None where it is not its turn.
        keys: for each replica the base key.
    """

    passes: Programs
    batch: Sequence[Sequence[Any]]
    keys: Sequence[Any]


@dataclass(slots=True)
class Step:
    """A step that is being dispatched.

    Attributes:
        run: what holds between steps.
        feed: what the step hands over; None while draining.
        first: the number of its first microbatch.
        cycle: the number of the cycle, since the last drain.
        outputs: what the last program made: values for later stages and results.
        returns: likewise: cotangents for earlier stages.
        made: the results of each microbatch, as an inbox.
        results: the results of the minibatch, once they were collected.
        done: what an observer is to be told of: kind, replica, microbatch, and the arrays made;
            None if there is no observer.
    """

    run: Run
    feed: Feed | None
    first: int
    cycle: int
    outputs: Values = ()
    returns: Values = ()
    made: dict[int, Any] = field(default_factory=dict)
    results: tuple[Any, Any, Values] | None = None
    done: list[tuple[ProgramKind, int, int, Any]] | None = None
