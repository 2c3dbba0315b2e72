"""Listings as text: what every replica of this process does with a minibatch, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pdjax.runtime.instructions import (
    Average,
    Block,
    Collect,
    Free,
    Instruction,
    PrepareUpdate,
    ReduceGradients,
    RunPass,
    Send,
    Split,
    UpdateWeights,
)
from pdjax.runtime.replica_map import ReplicaMap


@dataclass(frozen=True, eq=False)
class Listing:
    """The instructions of a process.

    Attributes:
        phases: for each minibatch of a cycle the blocks of the step that hands it over.
        replicas: where the stages are.
        is_local: for each replica whether this process runs it.
    """

    phases: tuple[tuple[Block, ...], ...]
    replicas: ReplicaMap
    is_local: tuple[bool, ...]

    def __iter__(self) -> Iterator[Instruction]:
        for blocks in self.phases:
            for block in blocks:
                yield from block.instructions

    def __str__(self) -> str:
        return to_text(self)


def to_text(listing: Listing) -> str:
    """A paragraph for each replica of this process, one after the other."""
    replicas = listing.replicas
    lines: list[str] = []
    for replica, (stage, worker) in enumerate(
        zip(replicas.stage_of, replicas.worker_of, strict=True)
    ):
        if not listing.is_local[replica]:
            continue
        lines.append(f"replica {replica}: stage {stage} on worker {worker}")
        for phase, blocks in enumerate(listing.phases):
            if len(listing.phases) > 1:
                lines.append(f" minibatch {phase} of {len(listing.phases)}")
            lines += [f"  {line}" for block in blocks for line in _lines(block, replica, listing)]
    return "\n".join(lines)


def _lines(block: Block, replica: int, listing: Listing) -> Iterator[str]:
    for instruction in block.instructions:
        text = _line(instruction, replica, listing)
        if text:
            yield text + (", in a thread of its own" if block.waits else "")


def _line(instruction: Instruction, replica: int, listing: Listing) -> str:
    """What an instruction is to a replica; "" if it is no business of its."""
    match instruction:
        case Send():
            return _send(instruction, replica)
        case RunPass() | UpdateWeights() | Free() | Split() | Average():
            return _own(instruction) if instruction.replica == replica else ""
        case Collect():
            collector = len(listing.replicas) - 1
            is_ours = replica == collector or not listing.is_local[collector]
            return "COLLECT results" if is_ours else ""
        case ReduceGradients():
            return _reduce(instruction, replica)
        case PrepareUpdate():
            return _prepare(instruction, replica)


def _own(instruction: RunPass | UpdateWeights | Free | Split | Average) -> str:
    match instruction:
        case RunPass():
            return _run(instruction)
        case UpdateWeights():
            return _update(instruction)
        case Free():
            return "FREE    versions that nothing reads any more"
        case Split():
            return f"SPLIT   gradients of update {instruction.update}"
        case Average():
            return f"AVERAGE mutable state {list(instruction.updates)}"


def _run(op: RunPass) -> str:
    names = ("consts", "state", "batch", "key")
    behind = "" if op.delay is None else f" {op.delay} update{'s' * (op.delay != 1)} behind"
    reads = [f"weights{behind}"] if op.kind[0] == "F" else []
    if op.kind[0] == "F" and op.reads is not None:
        reads += [name for name, is_read in zip(names, op.reads, strict=True) if is_read]
    parts = [f"reads {', '.join(reads)}"] if reads else []
    if op.stash_bytes:
        parts.append(f"stash {op.stash_bytes:+} B")
    if op.keeps and op.pins:
        parts.append("pins weights")
    if op.kind != "F":
        parts.append(f"update {op.update}{' begins' if op.begins else ''}")
    if op.donates:
        parts.append(f"donates {', '.join(op.donates)}")
    if op.pick_state is not None:
        parts.append(f"writes mutable state {list(op.updates)}")
    return f"RUN     {op.kind} {op.microbatch}: {'; '.join(parts)}"


def _send(op: Send, replica: int) -> str:
    what = f"{op.content} {op.microbatch}"
    size = f"{', '.join(map(_shape, op.shapes))}, {op.num_bytes} B"
    if op.source == op.target:
        return f"KEEP    {what}" if replica == op.source else ""
    lines = []
    if replica == op.source and op.sends:
        lines.append(f"SEND    {what} to {op.target}: {size}")
    if replica == op.target and op.receives:
        slots = "" if op.slots is None else f", slots {list(op.slots)} of {op.num_slots}"
        lines.append(f"RECV    {what} from {op.source}: {size}{slots}")
    local = ", local" if op.sends and op.receives else ""
    return "\n  ".join(line + local for line in lines)


def _shape(shape: Any) -> str:
    return f"{shape.dtype}[{','.join(map(str, shape.shape))}]"


def _reduce(op: ReduceGradients, replica: int) -> str:
    if replica not in op.replicas:
        return ""
    state = " and mutable state" if op.mean is not None else ""
    return (
        f"REDUCE  gradients of update {op.update}{state} over replicas {list(op.replicas)}: "
        f"{op.reduce.sent_bytes} B to the next one"
    )


def _prepare(op: PrepareUpdate, replica: int) -> str:
    if replica == op.replica:
        return f"PREPARE update {op.update}, phase {op.phase}; SEND to {list(op.targets)}"
    return f"RECV    phase {op.phase} from {op.replica}" if replica in op.targets else ""


def _update(op: UpdateWeights) -> str:
    donated = "weights" if op.runner.donates_weights else "gradients"
    return (
        f"UPDATE  {op.update}, microbatches up to {op.microbatch}, {op.size} together: "
        f"donates {donated}, optimizer state"
    )
