"""What the actions of a schedule send each other.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from pdjax.schedules.columns import B, Columns, F, I
from pdjax.simulate.stage_cost import StageCost


@dataclass(frozen=True, eq=False)
class Messages:
    """Messages between actions, by their positions.

    Attributes:
        source: the action that sends.
        target: the action that waits.
        num_bytes: how much.
    """

    source: np.ndarray
    target: np.ndarray
    num_bytes: np.ndarray

    @classmethod
    def joined(cls, several: Sequence[Messages]) -> Messages:
        """All of them."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(each, name) for each in several]) for name in names))

    def taken(self, index: np.ndarray) -> Messages:
        """Some of them."""
        return Messages(self.source[index], self.target[index], self.num_bytes[index])


def messages_between(columns: Columns, costs: Sequence[StageCost]) -> Messages:
    """The activations and cotangents of all microbatches, by the action that sends them.

    A stage waits for the one beside it even where that sends nothing.
    """
    passes = _positions(columns, len(costs))
    sends = [_with_neighbour(cost.sends, stage + 1) for stage, cost in enumerate(costs[:-1])]
    returns = [_with_neighbour(cost.returns, stage - 1) for stage, cost in enumerate(costs)][1:]
    parts = [_along(passes[0], stage, pairs) for stage, pairs in enumerate(sends)]
    parts += [_along(passes[1], stage, pairs) for stage, pairs in enumerate(returns, 1)]
    found = Messages.joined([_NOTHING, *parts])
    return found.taken(np.argsort(found.source, kind="stable"))


_NOTHING = Messages(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def _positions(columns: Columns, num_stages: int) -> np.ndarray:
    """Where F, and B or I, are for each stage and microbatch; -1 where they are not."""
    found = np.full((2, num_stages, columns.microbatch.max(initial=-1) + 1), -1)
    for group, kinds in enumerate(((F,), (B, I))):
        at = np.flatnonzero(np.isin(columns.kind, kinds))
        found[group, columns.stage[at], columns.microbatch[at]] = at
    return found


def _with_neighbour(
    pairs: tuple[tuple[int, float], ...], neighbour: int
) -> tuple[tuple[int, float], ...]:
    known = any(stage == neighbour for stage, _ in pairs)
    return pairs if known else (*pairs, (neighbour, 0.0))


def _along(passes: np.ndarray, stage: int, pairs: tuple[tuple[int, float], ...]) -> Messages:
    """What one stage sends, in the order of `pairs` for each microbatch."""
    targets = passes[[target for target, _ in pairs]].T.ravel()
    sources = np.repeat(passes[stage], len(pairs))
    sizes = np.tile([float(size) for _, size in pairs], passes.shape[1])
    there = (sources >= 0) & (targets >= 0)
    return Messages(sources[there], targets[there], sizes[there])
