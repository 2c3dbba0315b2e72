"""The actions of many workers as arrays.

Schedules are made and read as lists of actions. To check or simulate thousands of workers and
microbatches they are kept in columns, an entry for each action, worker after worker. Nothing here
imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from pdjax.column_table import ColumnTable
from pdjax.schedules.action import KINDS, LETTERS, Result

_CODES = np.full(256, -1)  # by letter
_CODES[list(LETTERS.encode())] = range(len(LETTERS))
_MAKES = {
    result: np.array([result in row.makes for row in KINDS.values()])
    for result in dict.fromkeys(result for row in KINDS.values() for result in row.makes)
}
_READS = {
    which: np.array([row.reads == which for row in KINDS.values()])
    for which in ("forward", "backward")
}


@dataclass(frozen=True, eq=False)
class Columns(ColumnTable):
    """Actions, worker after worker.

    Attributes:
        worker: for each action its worker.
        kind: its kind, as the position in `KINDS` and `LETTERS`.
        stage: its stage.
        microbatch: its microbatch.
        num_workers: number of workers.
    """

    worker: np.ndarray
    kind: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    num_workers: int

    @classmethod
    def of(cls, workers: Sequence[Sequence[tuple[str, int, int]]]) -> Columns:
        """The columns of lists of actions."""
        lengths = [len(worker) for worker in workers]
        flat = list(chain.from_iterable(workers))
        kinds = "".join(map(itemgetter(0), flat))
        stages, microbatches = (
            np.fromiter(map(itemgetter(at), flat), np.int64, len(flat)) for at in (1, 2)
        )
        return cls(
            np.repeat(np.arange(len(workers)), lengths),
            _CODES[np.frombuffer(kinds.encode(), np.uint8)],
            stages,
            microbatches,
            len(workers),
        )

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the actions of each worker start, and where the last one's stop."""
        return np.searchsorted(self.worker, np.arange(self.num_workers + 1))

    @property
    def num_stages(self) -> int:
        """Number of stages, the last one being the highest that occurs."""
        return int(self.stage.max(initial=-1)) + 1

    def makes(self, result: Result) -> np.ndarray:
        """For each action whether it makes a result."""
        return _MAKES[result][self.kind]

    def reads(self, which: Literal["forward", "backward"]) -> np.ndarray:
        """For each action whether it reads the weights of forward or of backward passes."""
        return _READS[which][self.kind]

    def rows(self) -> Iterator[Iterable[tuple[Any, int, int]]]:
        """For each worker the tuples (kind, stage, microbatch)."""
        kinds = [LETTERS[code] for code in self.kind.tolist()]
        lists = [kinds, self.stage.tolist(), self.microbatch.tolist()]
        for start, stop in zip(self.starts[:-1], self.starts[1:], strict=True):
            yield zip(*(column[start:stop] for column in lists), strict=True)

    def repeated(self, num_microbatches: int, cycle: int, lag: int) -> Columns:
        """The actions of one cycle written out for a number of microbatches, with the drain.

        An update at the end applies the gradients that are there.

        Example:
            Of PipeDream with three stages a cycle brings one microbatch and reaches two cycles
            back. For two microbatches it is run four times; microbatches before 0 and from 2 on
            drop out.

            >>> from pdjax.schedules import pipedream
            >>> cycle = pipedream(3).columns
            >>> for row in cycle.repeated(2, cycle=1, lag=2).rows():
            ...     print(*(f"{kind}{microbatch}" for kind, _, microbatch in row))
            F0 F1 B0 U0 B1 U1
            F0 F1 B0 U0 B1 U1
            F0 B0 U0 F1 B1 U1

        Args:
            num_microbatches: how many are handed over.
            cycle: microbatches in a cycle.
            lag: how many cycles back the actions reach.
        """
        # 1. Every cycle, one after the other. Arrays have shape (num_cycles * len(self),).
        num_cycles = -(-num_microbatches // cycle) + lag
        index = np.tile(np.arange(len(self)), num_cycles)
        shift = np.repeat(np.arange(num_cycles) * cycle, len(self))
        # 2. Each worker's actions together, its cycles in order.
        order = np.argsort(self.worker[index], kind="stable")
        every = self.take(index[order])
        microbatch = every.microbatch + shift[order]
        # 3. An update beyond the end whose round begins before it applies the gradients that the
        #    round has: it is that of the last microbatch.
        covers = np.where(every.makes("weights"), self.per_update(cycle)[every.stage], 1)
        partial = (microbatch >= num_microbatches) & (microbatch - covers + 1 < num_microbatches)
        microbatch = np.where(partial, num_microbatches - 1, microbatch)
        # 4. Actions of microbatches that there are.
        kept = (microbatch >= 0) & (microbatch < num_microbatches)
        return every.with_columns({"microbatch": microbatch}).take(kept)

    def per_update(self, cycle: int) -> np.ndarray:
        """For each stage how many microbatches one update applies, in a cycle of `cycle`."""
        updates = np.flatnonzero(self.makes("weights"))
        place = self.worker[updates] * self.num_stages + self.stage[updates]
        counts = np.bincount(place, minlength=self.num_workers * self.num_stages)
        num_updates = counts.reshape(self.num_workers, self.num_stages).max(axis=0, initial=0)
        return cycle // np.maximum(num_updates, 1)

    @property
    def turns(self) -> tuple[np.ndarray, int]:
        """Each action's microbatch, counted from the first one, and how many there are."""
        first, last = self.microbatch.min(initial=0), self.microbatch.max(initial=0)
        return self.microbatch - first, int(last - first) + 1
