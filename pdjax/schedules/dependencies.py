"""The dependency rule: which actions wait for which others.

`find_needs` reads the table of kinds (`pdjax.schedules.action.KINDS`) for all actions at once.
Dispatch order, validation, drawings and simulator take their edges from it. Nothing here imports
JAX.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pdjax.column_table import ColumnTable
from pdjax.schedules.action import KINDS, Need, Result
from pdjax.schedules.columns import Columns


@dataclass(frozen=True, eq=False)
class Needs(ColumnTable):
    """Pairs of actions, of which one waits for the other, by their positions.

    Attributes:
        action: the action that waits.
        need: the action that makes a result for it; -1 if there is none.
    """

    action: np.ndarray
    need: np.ndarray


@dataclass(frozen=True, eq=False)
class StagePairs(ColumnTable):
    """Pairs of stages, of which one sends to the other.

    Attributes:
        source: the stage that sends: activations to later stages, cotangents to earlier ones.
        target: the stage that waits for it, ascending.
    """

    source: np.ndarray
    target: np.ndarray

    @classmethod
    def chain(cls, num_stages: int) -> StagePairs:
        """Every stage sends to the next one, and back to the one before."""
        first, second = np.arange(num_stages - 1), np.arange(1, num_stages)
        pairs = cls(np.concatenate([first, second]), np.concatenate([second, first]))
        return pairs.sorted_by("target")

    def towards(self, step: int) -> StagePairs:
        """The pairs whose source is before its target (-1), behind it (1) or the same (0)."""
        return self.take(np.sign(self.source - self.target) == step)


def find_needs(
    columns: Columns,
    pairs: StagePairs | None = None,
    turn: np.ndarray | None = None,
    num_turns: int = 0,
) -> Needs:
    """For each action the actions that it waits for.

    An update waits for all gradients of its round: its worker's order sees to its own, see
    `find_round_needs` for those of other replicas.

    Example:
        Of three stages the last one waits for the middle one, and that for both.

        >>> columns = Columns.of([[("F", 0, 0)], [("F", 1, 0), ("B", 1, 0)], [("B", 2, 0)]])
        >>> sorted(find_needs(columns).tuples())
        [(1, 0), (2, 1), (2, 3), (3, -1)]

    Args:
        columns: the actions.
        pairs: which stages send to which; each to both its neighbours if None.
        turn: for each action a number that is the same for the same microbatch; the microbatch
            counted from the first one if None.
        num_turns: how many of these numbers there are, from 0 on.
    """
    if turn is None:
        turn, num_turns = columns.turns
    pairs = StagePairs.chain(columns.num_stages) if pairs is None else pairs
    shape = max(columns.num_stages, int(pairs.source.max(initial=-1)) + 1), num_turns
    makers: dict[Result, np.ndarray] = {}
    found = [Needs(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for code, need in _each_need():
        # 1. Where each result is made: positions of shape (num_stages, num_turns), -1 if nowhere.
        if need.result not in makers:
            makers[need.result] = _positions(columns, need.result, turn, shape)
        # 2. The actions that need it, once for each stage that sends to theirs.
        action = np.flatnonzero(columns.kind == code)
        stage = columns.stage[action]
        if need.step:
            repeats, stage = _senders(pairs.towards(need.step), stage)
            action = np.repeat(action, repeats)
        # 3. The maker for the same microbatch on that stage.
        found.append(Needs(action, makers[need.result][stage, turn[action]]))
    return Needs.concatenate(found)


def _each_need() -> Iterator[tuple[int, Need]]:
    """The code of a kind and one of its needs; those of a whole round are left out."""
    for code, row in enumerate(KINDS.values()):
        yield from ((code, need) for need in row.needs if not need.whole_round)


def _positions(
    columns: Columns, result: Result, turn: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    found = np.full(shape, -1)
    at = np.flatnonzero(columns.makes(result))
    found[columns.stage[at], turn[at]] = at
    return found


def _senders(pairs: StagePairs, stage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each entry of `stage` how many stages send to it; and these, entry after entry."""
    repeats, index = _matches(pairs.target, stage)
    return repeats, pairs.source[index]


def _matches(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each wanted key how often it is in ascending keys; and where, one after the other."""
    first, stop = (np.searchsorted(keys, wanted, side=side) for side in ("left", "right"))
    repeats = stop - first
    before = np.cumsum(repeats) - repeats
    return repeats, np.arange(repeats.sum()) + np.repeat(first - before, repeats)


def needs_in_cycle(columns: Columns, cycle: int) -> Needs:
    """The needs of the actions of one cycle that the cycles before it do not satisfy.

    A result for a later microbatch than that of the action was made in an earlier cycle. A need of
    -1 is a result that no earlier cycle makes.
    """
    needs = find_needs(columns, turn=columns.microbatch % cycle, num_turns=cycle)
    mine, there = columns.microbatch[needs.action], needs.need >= 0
    made = np.where(there, columns.microbatch[needs.need], np.iinfo(np.int64).min)
    return Needs(needs.action, np.where(made == mine, needs.need, -1)).take(made <= mine)


@dataclass(frozen=True, eq=False)
class Rounds:
    """The rounds of one stage: its replicas sum up their gradients, and all of them update.

    Attributes:
        microbatch: for each round its last microbatch, ascending; shape (num_rounds,).
        gradients: pairs of the last gradient of a worker and its round; shape (2, num_gradients).
        updates: pairs of a round and an update that waits for it; shape (2, num_updates).
    """

    microbatch: np.ndarray
    gradients: np.ndarray
    updates: np.ndarray

    @classmethod
    def of(cls, columns: Columns, stage: int) -> Rounds:
        """The rounds of a stage."""
        mine = columns.stage == stage
        updates = np.flatnonzero(mine & columns.makes("weights"))
        gradients = np.flatnonzero(mine & columns.makes("gradients"))
        microbatch, round_ = np.unique(columns.microbatch[updates], return_inverse=True)
        last = np.full((columns.num_workers, len(microbatch)), -1)
        of = np.searchsorted(microbatch, columns.microbatch[gradients])
        np.maximum.at(last, (columns.worker[gradients], of), gradients)
        # in the last round of a run a replica may have no gradient at all
        worker, some = np.nonzero(last >= 0)
        gradients = np.stack([last[worker, some], some])
        return cls(microbatch, gradients, np.stack([round_, updates]))

    def needs(self) -> Needs:
        """Each update waits for the last gradient of every worker in its round."""
        by_round = np.argsort(self.gradients[1], kind="stable")
        gradient, round_ = self.gradients[:, by_round]
        repeats, index = _matches(round_, self.updates[0])
        return Needs(np.repeat(self.updates[1], repeats), gradient[index])


def find_round_needs(columns: Columns, holders: Sequence[Sequence[int]]) -> Needs:
    """The needs of the updates of all stages that have replicas.

    Args:
        columns: the actions.
        holders: for each stage its workers.
    """
    stages = [stage for stage, workers in enumerate(holders) if len(workers) > 1]
    nothing = Needs(np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Needs.concatenate([nothing, *(Rounds.of(columns, stage).needs() for stage in stages)])
