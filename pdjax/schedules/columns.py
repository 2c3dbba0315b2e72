"""The actions of many workers as arrays.

Schedules are made and read as lists of actions. To check or simulate thousands of workers and
microbatches they are laid out in columns, an entry for each action, worker after worker. Nothing
here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

KINDS = "FBIWU"
"""The kinds of actions, in the order of their codes."""

F, B, I, W, U = range(len(KINDS))  # noqa: E741  # the letters of the field
_CODES = np.full(256, -1)  # by letter
_CODES[list(KINDS.encode())] = range(len(KINDS))


@dataclass(frozen=True, eq=False)
class Columns:
    """Actions, worker after worker.

    Attributes:
        worker: for each action its worker.
        kind: its kind, as the position in `KINDS`.
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

    def __len__(self) -> int:
        return len(self.kind)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the actions of each worker start, and where the last one's stop."""
        return np.searchsorted(self.worker, np.arange(self.num_workers + 1))

    def taken(self, index: np.ndarray) -> Columns:
        """Some of the actions."""
        return Columns(
            self.worker[index],
            self.kind[index],
            self.stage[index],
            self.microbatch[index],
            self.num_workers,
        )

    def rows(self) -> Iterator[Iterable[tuple[Any, int, int]]]:
        """For each worker the tuples (kind, stage, microbatch)."""
        columns = [KINDS[code] for code in self.kind.tolist()], self.stage, self.microbatch
        lists = [columns[0], columns[1].tolist(), columns[2].tolist()]
        for start, stop in zip(self.starts[:-1], self.starts[1:], strict=True):
            yield zip(*(column[start:stop] for column in lists), strict=True)

    def repeated(self, num_microbatches: int, cycle: int, lag: int) -> Columns:
        """The actions of one cycle written out for a number of microbatches, with the drain.

        An update at the end applies the gradients that are there.

        Args:
            num_microbatches: how many are handed over.
            cycle: microbatches in a cycle.
            lag: how many cycles back the actions reach.
        """
        num_cycles = -(-num_microbatches // cycle) + lag
        index = np.tile(np.arange(len(self)), num_cycles)
        shift = np.repeat(np.arange(num_cycles) * cycle, len(self))
        every = self.taken(index)
        order = np.argsort(every.worker, kind="stable")
        every, shift = every.taken(order), shift[order]
        microbatch = every.microbatch + shift
        # of a round that was broken off, the update that applies it
        covers = np.where(every.kind == U, self.per_update(cycle)[every.stage], 1)
        partial = (microbatch >= num_microbatches) & (microbatch - covers + 1 < num_microbatches)
        microbatch = np.where(partial, num_microbatches - 1, microbatch)
        kept = (microbatch >= 0) & (microbatch < num_microbatches)
        found = Columns(every.worker, every.kind, every.stage, microbatch, self.num_workers)
        return found.taken(kept)

    def per_update(self, cycle: int) -> np.ndarray:
        """For each stage how many microbatches one update applies, in a cycle of `cycle`."""
        num_stages = int(self.stage.max(initial=-1)) + 1
        mine = self.kind == U
        num_updates = np.zeros(num_stages, np.int64)
        for worker in range(self.num_workers):
            part = mine[self.starts[worker] : self.starts[worker + 1]]
            stages = self.stage[self.starts[worker] : self.starts[worker + 1]][part]
            num_updates = np.maximum(num_updates, np.bincount(stages, minlength=num_stages))
        return cycle // np.maximum(num_updates, 1)

    def inputs(self, turn: np.ndarray, span: int) -> tuple[np.ndarray, np.ndarray]:
        """For each action the positions of the two others whose results it may need.

        A forward pass needs that of the stage before; a backward pass or its input part the
        backward pass of the next stage and its own forward pass; a weight part its input part.

        Args:
            turn: for each action a number from 0 to `span`, the same for the same microbatch.
            span: how many of them there are.

        Returns:
            Two rows, the second for the forward passes: the positions, -1 where there is no such
            action; and whether one is needed at all.
        """
        num_stages = int(self.stage.max(initial=-1)) + 1
        group = np.array([0, 1, 1, 2, 3])[self.kind]
        where = np.full((4, num_stages + 2, span), -1)
        where[group, self.stage + 1, turn] = np.arange(len(self))
        step = np.array([-1, 1, 1, 0, 0])[self.kind]
        wanted = np.array([0, 1, 1, 1, 3])[self.kind]
        other = self.stage + step
        found = np.stack([where[wanted, other + 1, turn], where[0, self.stage + 1, turn]])
        beside = (self.kind != U) & (other >= 0) & (other < num_stages)
        needed = np.stack([beside, (self.kind == B) | (self.kind == I)])
        return np.where(needed, found, -1), needed

    @property
    def turns(self) -> tuple[np.ndarray, int]:
        """Each action's microbatch, counted from the first one, and how many there are."""
        first, last = self.microbatch.min(initial=0), self.microbatch.max(initial=0)
        return self.microbatch - first, int(last - first) + 1

    def slots(self) -> np.ndarray:
        """When each action starts if each takes one unit of time; -1 if it never can.

        What is not among the actions counts as there.
        """
        needs = self.inputs(*self.turns)[0].T
        found = np.full(len(self) + 1, -1)
        found[-1] = -2  # what position -1 stands for: it is there before anything starts
        done = np.zeros(len(self) + 1, bool)
        done[-1] = True
        at, stops = self.starts[:-1].copy(), self.starts[1:]
        free = np.zeros(self.num_workers, np.int64)
        active = np.flatnonzero(at < stops)
        while active.size:
            heads = at[active]
            ready = done[needs[heads]].all(axis=1)
            if not ready.any():
                break
            workers, heads = active[ready], heads[ready]
            begin = np.maximum(free[workers], found[needs[heads]].max(axis=1) + 1)
            found[heads] = begin
            done[heads] = True
            free[workers] = begin + 1
            at[workers] += 1
            active = np.flatnonzero(at < stops)
        return found[:-1]
