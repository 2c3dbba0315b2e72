"""What the actions of a schedule send each other.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdjax.column_table import ColumnTable
from pdjax.schedules.columns import Columns
from pdjax.schedules.dependencies import Needs, StagePairs
from pdjax.simulate.stage_cost import StageCost


@dataclass(frozen=True, eq=False)
class Messages(ColumnTable):
    """Messages between actions, by their positions.

    Attributes:
        source: the action that sends.
        target: the action that waits.
        num_bytes: how much.
    """

    source: np.ndarray
    target: np.ndarray
    num_bytes: np.ndarray


@dataclass(frozen=True, eq=False)
class StageLinks(StagePairs):
    """The pairs of stages of which one sends to the other, and how much.

    Attributes:
        order: of the pairs of one source and direction, the order in which it sends.
        num_bytes: how much it sends for each microbatch.
    """

    order: np.ndarray
    num_bytes: np.ndarray

    @classmethod
    def of(cls, costs: Sequence[StageCost]) -> StageLinks:
        """The links of all stages.

        A stage waits for the one beside it even where that sends nothing.
        """
        rows = []
        for stage, cost in enumerate(costs):
            sends = _with_neighbour(cost.sends, stage + 1) if stage + 1 < len(costs) else ()
            returns = _with_neighbour(cost.returns, stage - 1) if stage else ()
            for pairs in (sends, returns):
                rows += [(stage, target, order, size) for order, (target, size) in enumerate(pairs)]
        source, target, order, sizes = np.array(rows, float).reshape(-1, 4).T
        links = cls(source.astype(int), target.astype(int), order.astype(int), sizes)
        return links.sorted_by("target")

    def find(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The positions of pairs of stages that are linked."""
        num_stages = int(max(self.source.max(initial=0), self.target.max(initial=0))) + 1
        keys = self.source * num_stages + self.target
        by_key = np.argsort(keys)
        return by_key[np.searchsorted(keys[by_key], source * num_stages + target)]


def messages_between(columns: Columns, needs: Needs, links: StageLinks) -> Messages:
    """The activations and cotangents of all microbatches, by the action that sends them.

    Args:
        columns: the actions.
        needs: their needs; those on one stage need no message.
        links: how much each stage sends to others.
    """
    source, target = columns.stage[needs.need], columns.stage[needs.action]
    apart = np.flatnonzero((needs.need >= 0) & (source != target))
    link = links.find(source[apart], target[apart])
    messages = Messages(needs.need[apart], needs.action[apart], links.num_bytes[link])
    return messages.take(np.lexsort((links.order[link], messages.source)))


def _with_neighbour(
    pairs: tuple[tuple[int, float], ...], neighbour: int
) -> tuple[tuple[int, float], ...]:
    known = any(stage == neighbour for stage, _ in pairs)
    return pairs if known else (*pairs, (neighbour, 0.0))
