"""A schedule, lowered: for every action all that follows from schedule, weight rule and stages.

A schedule says which action a worker does, and in which order. Lowering adds, once and for all,

    sends      the values that an action hands to other stages: to which worker, how many bytes
    stash      by how many bytes the action changes the stash of its stage
    update     the update that a gradient is accumulated into; whether it begins the sum
    reduces    the all-reduce among the replicas of a stage, before the first of their updates
    frees      whether a version of the weights may have lost its last reader

in two forms, of the same functions. *Columns* describe a schedule written out for any number of
minibatches, an array entry for each action: the simulator counts them. *Rows* describe one cycle
that is under way, in the order of dispatch, microbatches counted from the first one of the
minibatch that is handed over: `pdjax.runtime.instructions` binds them to programs, and the executor
runs them. A worked example, two stages and two microbatches of GPipe:

    worker 0: 0F0 0F1         0B0 0B1 0U1      row of 0F1: sends ((1, worker 1, 64 bytes),)
    worker 1:     1F0 1F1 1B0 1B1 1U1          row of 1B0: update 0, begins; returns to worker 0

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from pdjax.schedules.action import KINDS, LETTERS, Action
from pdjax.schedules.columns import Columns
from pdjax.schedules.dispatch import dispatch_phases
from pdjax.schedules.schedule import Schedule
from pdjax.schedules.versions import delay_of
from pdjax.schedules.weight_rule import WeightRule

ProgramKind = Literal["F", "B", "I", "W", "FB", "U", "FBU"]
"""The kinds of programs: one for each kind of action, and those that do several at once."""

Fusion = Literal["", "FB", "FBU"]
"""The kinds of actions that a stage does in one program."""

Sizes = tuple[tuple[int, float], ...]
"""Pairs of a stage and the bytes that go to it with each microbatch."""


class Interface(Protocol):
    """What a stage hands over and keeps, in bytes for each microbatch.

    `pdjax.simulate.StageCost` is one, and so is `StageInterface`.

    Attributes:
        sends: the activations that go to later stages.
        returns: the cotangents that go to earlier stages.
        stash_bytes: bytes that wait from a forward pass to the backward pass or its input part.
        held_bytes: bytes that wait from an input part to the weight part, in their place.
    """

    @property
    def sends(self) -> Sizes:
        """The activations that go to later stages."""
        ...

    @property
    def returns(self) -> Sizes:
        """The cotangents that go to earlier stages."""
        ...

    @property
    def stash_bytes(self) -> float:
        """Bytes that wait for the backward pass or its input part."""
        ...

    @property
    def held_bytes(self) -> float:
        """Bytes that wait for the weight part."""
        ...


@dataclass(frozen=True)
class StageInterface:
    """An `Interface` and nothing else."""

    sends: Sizes = ()
    returns: Sizes = ()
    stash_bytes: float = 0
    held_bytes: float = 0


# ---------------------------------------------------------------- columns


def stash_changes(columns: Columns, interfaces: Sequence[Interface]) -> np.ndarray:
    """By how many bytes each action changes the stash of its worker.

    A forward pass that no backward pass follows keeps nothing.
    """
    stash = np.array([round(each.stash_bytes) for each in interfaces])
    held = np.array([round(each.held_bytes) for each in interfaces])
    kinds = np.stack([row.stash * stash + row.pending * held for row in KINDS.values()])
    changes = kinds[columns.kind, columns.stage]
    changes[_never_needed(columns, len(interfaces))] = 0
    return changes


def _never_needed(columns: Columns, num_stages: int) -> np.ndarray:
    """The forward passes that no backward pass follows."""
    span = columns.microbatch.max(initial=-1) + 1
    slot = columns.stage * span + columns.microbatch
    back = np.zeros(num_stages * span, bool)
    steps = np.array([row.stash for row in KINDS.values()])[columns.kind]
    back[slot[steps < 0]] = True
    return np.flatnonzero((steps > 0) & ~back[slot])


# ---------------------------------------------------------------- rows


class Destination(NamedTuple):
    """Where values go.

    Attributes:
        stage: the stage that reads them.
        worker: the worker that runs it for the microbatch.
        num_bytes: their size.
    """

    stage: int
    worker: int
    num_bytes: int


class LoweredAction(NamedTuple):
    """An action, or several that are one program, with all that follows from the schedule.

    Attributes:
        kind: what is done.
        worker: by whom.
        stage: for which stage.
        microbatch: for which microbatch, counted from the first one of the minibatch that is handed
            over; of an update the last one whose gradient it applies.
        sends: where the activations go.
        returns: where the cotangents go.
        stash_bytes: by how much the action changes the stash.
        update: the update that the gradient is accumulated into, or that is made; counted in the
            cycle.
        begins: whether the gradient is the first one of its sum.
        completes: whether it is the last one.
        reduces: of an update, whether it is the first one of the stage's replicas in its round.
        frees: whether a version of the weights may not be needed after it.
        delay: by how many updates the weights that a forward pass reads are behind: minibatch t,
            counted from the last drain, reads version ``max(0, t - delay)``; None for the newest.
        pins: whether the stash keeps these weights for the backward pass.
    """

    kind: ProgramKind
    worker: int
    stage: int
    microbatch: int
    sends: tuple[Destination, ...] = ()
    returns: tuple[Destination, ...] = ()
    stash_bytes: int = 0
    update: int = 0
    begins: bool = False
    completes: bool = False
    reduces: bool = False
    frees: bool = False
    delay: int | None = None
    pins: bool = False


Phases = tuple[tuple[LoweredAction, ...], ...]
"""For each minibatch of a cycle what is dispatched once it is handed over, in order."""


def lower_cycle(
    schedule: Schedule,
    rule: WeightRule,
    interfaces: Sequence[Interface],
    fusions: Sequence[Fusion] | None = None,
) -> Phases:
    """One cycle of a schedule that is under way, as rows.

    Args:
        schedule: the schedule.
        rule: which versions of the weights passes read.
        interfaces: of each stage.
        fusions: for each stage the actions that are one program; none if None.

    Raises:
        ScheduleError: if a worker never can go on.
    """
    return _CycleLowering(schedule, rule, interfaces, fusions or ("",) * len(interfaces)).rows()


def find_fusions(
    schedule: Schedule,
    rule: WeightRule,
    num_waits: Sequence[int],
    *,
    updates_alone: bool,
) -> tuple[Fusion, ...]:
    """What each stage does in one program.

    A forward and a backward pass that follow each other, where the stage waits for no cotangent in
    between; with the update if that needs nothing but these gradients, and is made to the weights
    that they were computed with.

    Args:
        schedule: the schedule.
        rule: which versions of the weights passes read.
        num_waits: for each stage how many cotangents it waits for.
        updates_alone: whether the update of a stage needs nothing of other stages, and no weight of
            the loss.
    """

    def fusion(stage: int) -> Fusion:
        holders = schedule.holders[stage]
        if num_waits[stage]:
            return ""
        alone = updates_alone and rule.forward == "newest" and len(holders) == 1
        if alone and _always_follow(schedule, stage, "FBU"):
            return "FBU"
        return "FB" if _always_follow(schedule, stage, "FB") else ""

    return tuple(fusion(stage) for stage in range(schedule.num_stages))


def _always_follow(schedule: Schedule, stage: int, kinds: str) -> bool:
    """Whether every forward pass of `stage` is directly followed by the others."""

    def follow(worker: Sequence[Action], at: int, microbatch: int) -> bool:
        found = worker[at : at + len(kinds)]
        same = all((a.stage, a.microbatch) == (stage, microbatch) for a in found)
        return same and "".join(a.kind for a in found) == kinds

    return all(
        follow(schedule.workers[number], at, first.microbatch)
        for number in schedule.holders[stage]
        for at, first in enumerate(schedule.workers[number])
        if first.kind == "F" and first.stage == stage
    )


class _CycleLowering:
    """Reads the rows of a cycle under way off the columns of a schedule written out."""

    def __init__(
        self,
        schedule: Schedule,
        rule: WeightRule,
        interfaces: Sequence[Interface],
        fusions: Sequence[Fusion],
    ) -> None:
        self.schedule, self.rule = schedule, rule
        self.interfaces, self.fusions = interfaces, fusions
        self.delay = delay_of(rule, schedule)
        # 1. Enough cycles that one of them has neither a beginning nor an end in reach.
        num_cycles = 1 if schedule.flushes else 2 * schedule.lag + 3
        self.first = 0 if schedule.flushes else (schedule.lag + 1) * schedule.cycle
        self.columns = columns = schedule.unrolled(num_cycles * schedule.num_minibatches)
        # 2. What all actions do, by their positions.
        self.stash = stash_changes(columns, interfaces)
        self.begins, self.completes = _ends_of_sums(columns, schedule.per_update)
        # 3. The positions of the actions, by what identifies them.
        keys = zip(columns.worker, columns.kind, columns.stage, columns.microbatch, strict=True)
        self.at = {tuple(map(int, key)): at for at, key in enumerate(keys)}

    def rows(self) -> Phases:
        size = self.schedule.num_microbatches
        found: list[list[LoweredAction]] = []
        for phase, turns in enumerate(dispatch_phases(self.schedule)):
            rows = []
            for worker, action in turns:
                kinds = self.fusions[action.stage] or action.kind
                if action.kind == kinds[0] or action.kind not in kinds:
                    kinds = kinds if action.kind in kinds else action.kind
                    rows.append(self.row(kinds, worker, action, phase * size))
            found.append(rows)
        return tuple(map(tuple, _mark_reduces(found, self.schedule)))

    def row(self, kinds: str, worker: int, action: Action, shift: int) -> LoweredAction:
        """The row of one program; `shift` is the first microbatch of its minibatch in the cycle."""
        _, stage, offset = action
        positions = [self.position(kind, worker, stage, offset + shift) for kind in kinds]
        pairs = self.interfaces[stage]
        forward = kinds[0] == "F"
        backward = kinds[-1] in "BI" or kinds == "FBU"
        return LoweredAction(
            kinds,  # type: ignore[arg-type]
            worker,
            stage,
            offset,
            self.destinations(offset + shift, pairs.sends) if forward else (),
            self.destinations(offset + shift, pairs.returns) if backward else (),
            int(sum(self.stash[at] for at in positions)),
            (offset + shift) // self.schedule.per_update[stage],
            any(bool(self.begins[at]) for at in positions),
            any(bool(self.completes[at]) for at in positions),
            frees=self.frees(kinds),
            delay=self.delay,
            pins=self.rule.backward == "stashed",
        )

    def position(self, kind: str, worker: int, stage: int, microbatch: int) -> int:
        return self.at[worker, LETTERS.index(kind), stage, self.first + microbatch]

    def destinations(self, microbatch: int, sizes: Sizes) -> tuple[Destination, ...]:
        """The replicas that get the values of a microbatch, counted in the cycle."""
        return tuple(
            Destination(stage, self.schedule.worker_of(stage, microbatch), round(num_bytes))
            for stage, num_bytes in sizes
        )

    def frees(self, kinds: str) -> bool:
        """Whether a version may lose its last reader with the last action of `kinds`."""
        if kinds == "FBU" or (self.rule.backward, self.rule.forward) == ("newest", "newest"):
            return False
        return kinds[-1] in "BWU" or self.rule.forward != "newest"


def _ends_of_sums(columns: Columns, per_update: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Whether each action adds the first, or the last, gradient to a sum of its worker.

    Of a divided backward pass both parts make gradients: each begins those that it makes, and the
    weight part completes them.
    """
    begins, completes = np.zeros(len(columns), bool), np.zeros(len(columns), bool)
    update = columns.microbatch // np.array(per_update)[columns.stage]
    span = int(update.max(initial=0)) + 1
    group = (columns.worker * (columns.stage.max(initial=0) + 1) + columns.stage) * span + update
    for code, row in enumerate(KINDS.values()):
        if row.reads != "backward":
            continue
        at = np.flatnonzero(columns.kind == code)  # ascending, as each worker does them
        begins[at[np.unique(group[at], return_index=True)[1]]] = True
        if "gradients" in row.makes:
            last = len(at) - 1 - np.unique(group[at][::-1], return_index=True)[1]
            completes[at[last]] = True
    return begins, completes


def _mark_reduces(phases: list[list[LoweredAction]], schedule: Schedule) -> list[list]:
    """The rows with a mark on the first update of each round, in the order of dispatch.

    Replicas update in one step, or in steps after each other; the one that comes first has waited
    for the gradients of all. It reaches back the least.
    """
    size, firsts = schedule.num_microbatches, {}
    for phase, rows in enumerate(phases):
        for at, row in enumerate(rows):
            if row.kind == "U" and len(schedule.holders[row.stage]) > 1:
                key = row.stage, (phase * size + row.microbatch) % schedule.cycle
                known = firsts.get(key)
                if known is None or row.microbatch > phases[known[0]][known[1]].microbatch:
                    firsts[key] = phase, at
    for phase, at in firsts.values():
        phases[phase][at] = phases[phase][at]._replace(reduces=True)
    return phases
