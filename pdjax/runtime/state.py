"""What a run of a pipeline holds between programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pdjax.runtime.inputs import Given
from pdjax.runtime.programs import InstructionKind, Passes
from pdjax.trace.jit import Values


class Kept(NamedTuple):
    """What a stage keeps of a microbatch until its backward pass, or one of its parts.

    Attributes:
        passes: the programs that its forward pass belongs to.
        version: the version of the weights that the forward pass read.
        weights: that version; None if the newest will do.
        given: what else of the inputs is read then.
        values: the activations; for the weight part what it reads of them, and what the input part
            held for it.
    """

    passes: Passes
    version: int
    weights: Values | None
    given: Given
    values: Values


@dataclass
class StageState:
    """What one place (a stage, or one of its replicas) holds.

    Attributes:
        weights: the newest version of its parameters.
        optimizer: its part of the optimizer state.
        model: its leaves of the mutable state, by index.
        version: number of updates applied.
        base: the version at the last drain.
        wanted: the oldest version that a forward pass may yet read.
        older: versions before the newest that a forward pass is yet to read.
        gradients: for each update to come, by its number since the last drain, the sum of its
            gradients so far; None for those of which there is none.
        reduced: of which updates these are the sums of all replicas already.
        summed: of how many microbatches they are the sum, where replicas are told.
        stash: what is kept for each microbatch in flight.
        halfway: what is kept for each microbatch whose backward pass lacks its weight part.
        inbox: values received for forward passes to come, by microbatch and position.
        returned: cotangents received for backward passes to come.
        new_model: new values of the mutable state, where they are averaged over a minibatch.
        num_versions: how many versions of the weights are alive.
        performed: how many programs of each kind were dispatched.
        stash_bytes: bytes that wait for backward passes, or for their weight parts.
        peak_stash_bytes: the most that these were.
        peak_in_flight: the most microbatches that were in flight at once.
        peak_versions: the most versions of the weights that were alive at once.
    """

    weights: Values
    optimizer: Values
    model: dict[int, Any]
    version: int = 0
    base: int = 0
    wanted: int = 0
    older: dict[int, Values] = field(default_factory=dict)
    gradients: dict[int, Values | None] = field(default_factory=dict)
    reduced: set[int] = field(default_factory=set)
    summed: Counter[int] = field(default_factory=Counter)
    stash: dict[int, Kept] = field(default_factory=dict)
    halfway: dict[int, Kept] = field(default_factory=dict)
    inbox: dict[int, dict[int, Any]] = field(default_factory=dict)
    returned: dict[int, list[dict[int, Any]]] = field(default_factory=dict)
    new_model: list[Values] = field(default_factory=list)
    num_versions: int = 1
    performed: Counter[InstructionKind] = field(default_factory=Counter)
    stash_bytes: int = 0
    peak_stash_bytes: int = 0
    peak_in_flight: int = 0
    peak_versions: int = 1

    def __post_init__(self) -> None:
        self.weight_bytes = sum(leaf.nbytes for leaf in self.weights)

    def of_version(self, version: int) -> Values:
        """The weights of a version that a forward pass may read."""
        return self.weights if version == self.version else self.older[version]

    def retire(self) -> None:
        """Lets go of the versions that no forward pass will read any more."""
        for version in [v for v in self.older if v < self.wanted]:
            del self.older[version]

    def restart(self) -> None:
        """Begins the count of versions anew, as a drain does."""
        self.base = self.wanted = self.version
        self.older.clear()


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
        """Counts what came, or, if negative, what went."""
        self.version_bytes += version_bytes
        self.stash_bytes += stash_bytes
        self.peak_bytes = max(self.peak_bytes, self.version_bytes + self.stash_bytes)


@dataclass
class Run:
    """What an executor's run holds between steps.

    Attributes:
        stages: what each place holds, stage after stage.
        workers: what each worker holds, counted.
        fed: number of microbatches handed over so far; the next one gets this number.
        start: the first microbatch after the last drain.
        passes: the programs of the last minibatch.
        divisors: for each minibatch not yet applied everywhere, by its first microbatch, the
            array that its gradients are divided by (only for weighted losses).
        sent_bytes: bytes that each place sent to each other, by (from, to).
    """

    stages: list[StageState]
    workers: list[WorkerTally]
    fed: int = 0
    start: int = 0
    passes: Passes | None = None
    divisors: dict[int, Any] = field(default_factory=dict)
    sent_bytes: Counter[tuple[int, int]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Feed:
    """What a step hands to the stages.

    Attributes:
        passes: the programs for minibatches of this shape.
        batch: for each place and microbatch its batch leaves; None where it is not its turn.
        keys: for each place the base key.
    """

    passes: Passes
    batch: Sequence[Sequence[Any]]
    keys: Sequence[Any]


@dataclass
class Step:
    """A step that is being dispatched.

    Attributes:
        run: what holds between steps.
        feed: what the step hands over; None while draining.
        first: the number of its first microbatch.
        made: for each microbatch its results, by position.
        results: the results of the minibatch, once they were asked for.
        updating: the places whose update was reached.
    """

    run: Run
    feed: Feed | None
    first: int
    made: dict[int, dict[int, Any]] = field(default_factory=dict)
    results: tuple[Any, Any, Values] | None = None
    updating: list[int] = field(default_factory=list)

    @property
    def passes(self) -> Passes:
        """The programs of the minibatch that the step hands over."""
        assert self.feed is not None, "nothing is handed over while draining"
        return self.feed.passes
