"""The instructions that a process runs with every minibatch: a schedule, bound to programs.

`pdjax.schedules.lower` says of every action where its values go, what it does to the stash and
which update it is for. Here that becomes a list in which nothing is left to be found out:

    RUN       a compiled program at a replica: F, B, I, W, FB or FBU
    SEND      values of the last program to another replica; RECV at the other end
    FREE      versions of the weights that nothing reads any more
    SPLIT     the finished gradients of a replica, into the pieces that travel around the ring
    COLLECT   the loss and the metrics of the minibatch, in every process
    AVERAGE   the mutable state of a minibatch, out of those of its microbatches
    REDUCE    the gradients of a stage's replicas, and their mutable state, before their updates
    PREPARE   the part of an update that other stages need something of, such as a norm
    UPDATE    the weights and the optimizer state of a replica

The instructions of one action are a `Block`; a block is run or left out as a whole, as microbatches
that were never handed over have none. A `Listing` has the blocks of each minibatch of a cycle, in
the order of dispatch. All processes make their listings from one lowered schedule, each with what
it runs, sends or receives itself, so that they send and receive in one order.

Microbatches are counted from the first one of the minibatch that is handed over, updates from the
first one of the cycle; ``print(listing)`` shows the work of each replica (`runtime.listing`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pdjax.communication.all_reduce import MeanOfState, Reduce
from pdjax.communication.ring import RingReduce
from pdjax.runtime.inputs import Reads
from pdjax.runtime.routing import Pick
from pdjax.runtime.update import UpdateRunner
from pdjax.schedules.lower import LoweredAction, ProgramKind
from pdjax.trace.jit import Values

Content = Literal["activations", "cotangents", "results"]


@dataclass(frozen=True, eq=False, slots=True)
class RunPass:
    """RUN: a pass, or two of them, or both and the update, at a replica.

    Attributes:
        kind: the kind of the program; also the instruction's name.
        replica: where it runs.
        microbatch: for which microbatch.
        program: what is called.
        reads: what is read of consts, mutable state, batch and key; None for nothing.
        kept_reads: what the stash keeps of these; the very same object if it is the same.
        keeps: whether the stash keeps anything.
        consts: the closed-over arrays that the stage reads.
        state: the leaves of the mutable state that the stage reads.
        updates: the leaves of the mutable state that it writes.
        num_activations: how many values it waits for.
        group: divides the cotangents that came by value.
        pick_saved: of the program's outputs those that the stash keeps.
        pick_state: of its outputs the new mutable state; None if there is none.
        averages: whether that is averaged over a minibatch.
        update: the update that its gradient is accumulated into.
        updates_per_cycle: how many updates the replica makes in a cycle.
        begins: whether its gradient is the first one of the sum.
        stash_bytes: by how much it changes the stash.
        frees: whether a FREE follows, with which the most that is held is counted.
        delay: by how many updates the weights that it reads are behind; None for the newest.
        pins: whether the stash keeps these weights.
        donates: what the program reuses the memory of.
    """

    kind: ProgramKind
    replica: int
    microbatch: int
    program: Callable[..., Any]
    reads: Reads | None
    kept_reads: Reads | None
    keeps: bool
    consts: Values
    state: tuple[int, ...]
    updates: tuple[int, ...]
    num_activations: int
    group: Callable[[Values], tuple[Values, ...]]
    pick_saved: Pick
    pick_state: Pick | None
    averages: bool
    update: int
    updates_per_cycle: int
    begins: bool
    stash_bytes: int
    frees: bool
    delay: int | None
    pins: bool
    donates: tuple[str, ...]

    @property
    def op(self) -> str:
        """The kind, by which the executor finds the method."""
        return self.kind


@dataclass(frozen=True, eq=False, slots=True)
class Send:
    """SEND at one end, RECV at the other: values of the last program, to an inbox.

    Attributes:
        content: what they are.
        source: the replica that made them.
        target: the replica that gets them.
        microbatch: the microbatch that they are of.
        pick: of the values that the program made those that go there.
        shapes: their shapes.
        num_bytes: their size.
        slots: their slots in the inbox; None if they fill all of them, in order.
        num_slots: how many slots there are.
        sends: whether the source is in this process.
        receives: whether the target is.
    """

    content: Content
    source: int
    target: int
    microbatch: int
    pick: Pick
    shapes: Values
    num_bytes: int
    slots: tuple[int, ...] | None
    num_slots: int
    sends: bool
    receives: bool
    op: ClassVar[str] = "SEND"


@dataclass(frozen=True, eq=False, slots=True)
class Free:
    """FREE: the versions of a replica's weights that nothing reads any more."""

    replica: int
    microbatch: int
    op: ClassVar[str] = "FREE"


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """SPLIT: the finished gradients of a replica, for the ring; `number` is its place there."""

    replica: int
    microbatch: int
    number: int
    ring: RingReduce
    update: int
    updates_per_cycle: int
    op: ClassVar[str] = "SPLIT"


@dataclass(frozen=True, eq=False, slots=True)
class Collect:
    """COLLECT: the results of the minibatch."""

    microbatch: int = 0
    op: ClassVar[str] = "COLLECT"


@dataclass(frozen=True, eq=False, slots=True)
class Average:
    """AVERAGE: the mutable state of a replica; `updates` are the leaves."""

    replica: int
    microbatch: int
    updates: tuple[int, ...]
    op: ClassVar[str] = "AVERAGE"


@dataclass(frozen=True, eq=False, slots=True)
class ReduceGradients:
    """REDUCE: the gradients of replicas for an update, and then their mutable state.

    Attributes:
        replicas: of one stage.
        local: for each of them whether this process runs it.
        microbatch: the last one whose gradient is in the sum.
        reduce: sums the gradients.
        mean: averages the mutable state; None if there is none.
        update: the update that waits for it.
        updates_per_cycle: how many updates a replica makes in a cycle.
    """

    replicas: range
    local: tuple[bool, ...]
    microbatch: int
    reduce: Reduce
    mean: MeanOfState | None
    update: int
    updates_per_cycle: int
    op: ClassVar[str] = "REDUCE"


@dataclass(frozen=True, eq=False, slots=True)
class PrepareUpdate:
    """PREPARE: a phase of an update of which other stages need something, and the sending.

    Attributes:
        replica: the first replica of a stage; all would send the same.
        stage: its stage.
        microbatch: the last microbatch whose gradient is applied.
        phase: the number of the phase.
        runner: the update.
        targets: the replicas that need it, or for which this process sends it.
        local: whether this process runs the replica.
        update: the update.
        updates_per_cycle: how many updates the replica makes in a cycle.
        size: how many microbatches an update applies.
    """

    replica: int
    stage: int
    microbatch: int
    phase: int
    runner: UpdateRunner
    targets: tuple[int, ...]
    local: bool
    update: int
    updates_per_cycle: int
    size: int
    op: ClassVar[str] = "PREPARE"


@dataclass(frozen=True, eq=False, slots=True)
class UpdateWeights:
    """UPDATE: new weights and optimizer state at a replica.

    Attributes:
        replica: where.
        microbatch: the last microbatch whose gradient is applied.
        runner: the update.
        update: the update.
        updates_per_cycle: how many updates the replica makes in a cycle.
        size: how many microbatches an update applies.
        frees: whether a FREE follows.
        keeps: whether forward passes to come may read the old weights.
    """

    replica: int
    microbatch: int
    runner: UpdateRunner
    update: int
    updates_per_cycle: int
    size: int
    frees: bool
    keeps: bool
    op: ClassVar[str] = "UPDATE"


Instruction = (
    RunPass
    | Send
    | Free
    | Split
    | Collect
    | Average
    | ReduceGradients
    | PrepareUpdate
    | UpdateWeights
)


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """The instructions of one action.

    Attributes:
        microbatch: the microbatch of the action.
        num_microbatches: how many the action is for: one, or as many as an update applies. An
            update at the end of a round that was broken off applies those that there are.
        waits: whether it waits for other processes, so that it has a thread of its own.
        instructions: what this process does.
    """

    microbatch: int
    num_microbatches: int
    waits: bool
    instructions: tuple[Instruction, ...]


def donated_by(row: LoweredAction, update: UpdateRunner | None) -> tuple[str, ...]:
    """What a program of a pass reuses the memory of."""
    if row.kind == "FBU":
        weights = ("weights",) if update is not None and update.donates_weights else ()
        return (*weights, "optimizer state")
    return () if row.kind == "F" or row.begins else ("gradients",)
