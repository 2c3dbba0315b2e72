"""Arrows of a trace: from a span that made a value to the span that waited for it.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from pdjax.schedules.action import KINDS, Need, Result
from pdjax.timeline.timeline import TRANSFERS, Span, SpanKind, Transfer, actions_of


def _from_others(kind: SpanKind) -> tuple[Need, ...]:
    """The needs of a span's first action that other workers satisfy."""
    needs = KINDS[actions_of(kind)[0]].needs
    return tuple(need for need in needs if need.step or need.whole_round)


@cache
def _makes(kind: SpanKind, result: Result) -> bool:
    return any(result in KINDS[letter].makes for letter in actions_of(kind))


@cache
def _takes(kind: SpanKind, result: Result) -> bool:
    return any(need.result == result for need in _from_others(kind))


_RESULTS: dict[str, Result] = {letter: result for result, letter in TRANSFERS.items()}
_DIRECTION: dict[Result, int] = {
    need.result: -need.step for kind in KINDS for need in _from_others(kind)
}
"""Whether a result goes to later stages (1), to earlier ones (-1) or stays in its stage (0)."""


class Slice(NamedTuple):
    """A span or a transfer on a thread of a trace.

    Attributes:
        entry: the span or transfer.
        tid: the thread.
        start_ns: its start, in nanoseconds.
        end_ns: its end.
    """

    entry: Span | Transfer
    tid: int
    start_ns: int
    end_ns: int


def find_arrows(slices: Sequence[Slice]) -> Iterator[tuple[Slice, Slice]]:
    """Pairs of a slice and one that waited for it, on another thread.

    From the span that made a value to its transfer, and from there to the span that waited;
    without transfers from the pass of a stage to that of the next one. No arrow begins at a span
    that took no time: viewers need a moment at which it was open. An uncertain pair has no arrow.
    """
    finder = _Finder(slices)
    transfers = [piece for piece in slices if isinstance(piece.entry, Transfer)]
    for piece in transfers:
        giver, taker = finder.giver(piece), finder.taker(piece)
        through = piece.end_ns > piece.start_ns
        if giver and taker and not through:
            yield giver, taker
        if giver and through:
            yield giver, piece
        if taker and through:
            yield piece, taker
    if not transfers:
        for piece in slices:
            yield from ((piece, taker) for taker in finder.followers(piece))


class _Finder:
    """The spans by worker and microbatch."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self._spans: defaultdict[tuple[int, int], list[Slice]] = defaultdict(list)
        self._workers: defaultdict[int, set[int]] = defaultdict(set)
        for piece in slices:
            if isinstance(piece.entry, Span):
                self._spans[piece.entry.worker, piece.entry.microbatch].append(piece)
                self._workers[piece.entry.stage].add(piece.entry.worker)

    def giver(self, sent: Slice) -> Slice | None:
        """The span that made the values of a transfer: the last possible one."""
        entry = sent.entry
        assert isinstance(entry, Transfer)
        result = _RESULTS[entry.kind]
        found = (
            piece
            for piece in self._spans[entry.source, entry.microbatch]
            if isinstance(piece.entry, Span)
            and _makes(piece.entry.kind, result)
            and piece.entry.stage == entry.stage
            and piece.start_ns < piece.end_ns <= sent.start_ns + 1  # as times are rounded
        )
        return max(found, key=lambda piece: piece.end_ns, default=None)

    def taker(self, sent: Slice) -> Slice | None:
        """The span that waited for a transfer: the first possible one."""
        entry = sent.entry
        assert isinstance(entry, Transfer)
        return self._first(_RESULTS[entry.kind], entry.target, sent)

    def followers(self, piece: Slice) -> Iterator[Slice]:
        """The spans that waited for one on another worker, if its values went on."""
        entry = piece.entry
        assert isinstance(entry, Span)
        for result, direction in _DIRECTION.items():
            if direction and _makes(entry.kind, result) and piece.end_ns > piece.start_ns:
                workers = self._workers.get(entry.stage + direction, set())
                for worker in sorted(workers - {entry.worker}):
                    if taker := self._first(result, worker, piece):
                        yield taker

    def _first(self, result: Result, worker: int, before: Slice) -> Slice | None:
        """The first span on a worker that takes a result of a slice."""
        stage, direction = before.entry.stage, _DIRECTION[result]
        found = (
            piece
            for piece in self._spans[worker, before.entry.microbatch]
            if isinstance(piece.entry, Span)
            and _takes(piece.entry.kind, result)
            and _sign(piece.entry.stage - stage) == direction
            and piece.start_ns >= before.end_ns - 1  # as times are rounded
        )
        return min(found, key=lambda piece: piece.start_ns, default=None)


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
