"""Timelines: the spans of every worker, as a value.

Simulated (`pdjax.simulate`) or measured by the executor (`Pipeline.record`): the same type, so
that one can be laid over the other. Nothing here imports JAX.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, cast

import numpy as np

from pdjax.schedules.action import ActionKind, Result
from pdjax.timeline.rows import column

SpanKind = ActionKind | Literal["FB", "FBU"]
"""The kind of a span: one action, or several in one program, by the letters of
`pdjax.schedules.action.KINDS`."""


def actions_of(kind: SpanKind) -> tuple[ActionKind, ...]:
    """The actions that a span is of, in order."""
    return cast(tuple[ActionKind, ...], tuple(kind))


TransferKind = Literal["F", "B", "R"]
"""The kind of a transfer: activations, their cotangents, gradients in an all-reduce."""

TRANSFERS: dict[Result, TransferKind] = {"activations": "F", "cotangents": "B", "gradients": "R"}
"""The letter of each result that travels."""


class Span(NamedTuple):
    """One action of a worker in time.

    Attributes:
        worker: the worker.
        kind: the kind of action.
        stage: the stage that it belongs to.
        microbatch: the microbatch; for an update the last one whose gradient it applied.
        start_s: when it could start: its inputs were there and the worker was free. In seconds.
        end_s: when its results were ready.
    """

    worker: int
    kind: SpanKind
    stage: int
    microbatch: int
    start_s: float
    end_s: float

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @property
    def duration_s(self) -> float:
        """How long it took, in seconds."""
        return self.end_s - self.start_s


class Transfer(NamedTuple):
    """Values on their way from one worker to another.

    Attributes:
        source: the worker that sends.
        target: the worker that receives.
        kind: the kind of values.
        stage: the stage that made them.
        microbatch: the microbatch; of gradients the last one that they are of.
        num_bytes: their size.
        start_s: when the link was free for them. In seconds.
        end_s: when they had arrived.
    """

    source: int
    target: int
    kind: TransferKind
    stage: int
    microbatch: int
    num_bytes: int
    start_s: float
    end_s: float


class MemorySample(NamedTuple):
    """The bytes that a worker holds from a moment on, until its next sample.

    Attributes:
        worker: the worker.
        time_s: the moment, in seconds.
        stash_bytes: activations that wait for a backward pass, of all its microbatches in flight.
        version_bytes: all versions of the weights of all its stages.
    """

    worker: int
    time_s: float
    stash_bytes: int
    version_bytes: int


@dataclass(frozen=True)
class Timeline:
    """The spans of all workers, the transfers between them, and the bytes that they held.

    Attributes:
        title: a name of the run.
        num_workers: number of workers.
        spans: the spans, by start.
        transfers: the transfers, by start; empty if they were not followed.
        memory: samples of the bytes that workers held, by time; empty if it was not followed.
    """

    title: str
    num_workers: int
    spans: Sequence[Span]
    transfers: Sequence[Transfer] = ()
    memory: Sequence[MemorySample] = ()

    def __post_init__(self) -> None:
        for entries in (self.spans, self.transfers):
            wrong = ~(column(entries, "start_s") <= column(entries, "end_s"))
            if wrong.any():
                raise ValueError(f"{entries[int(wrong.argmax())]} ends before it starts.")

    @classmethod
    def of(cls, title: str, num_workers: int, spans: Iterable[Span]) -> Timeline:
        """Makes a timeline that begins at zero."""
        ordered = sorted(spans, key=lambda span: (span.start_s, span.worker))
        zero = ordered[0].start_s if ordered else 0.0
        shifted = (s._replace(start_s=s.start_s - zero, end_s=s.end_s - zero) for s in ordered)
        return cls(title, num_workers, tuple(shifted))

    @cached_property
    def makespan_s(self) -> float:
        """From the first start to the last end of a span, in seconds."""
        return float(column(self.spans, "end_s").max(initial=0.0))

    def spans_of(self, worker: int) -> tuple[Span, ...]:
        """The spans of one worker, in order."""
        return self._by_worker.get(worker, ())

    @cached_property
    def _by_worker(self) -> dict[int, tuple[Span, ...]]:
        found: defaultdict[int, list[Span]] = defaultdict(list)
        for span in self.spans:
            found[span.worker].append(span)
        return {worker: tuple(spans) for worker, spans in found.items()}

    def busy_s(self, worker: int) -> float:
        """How long a worker had something to do, in seconds."""
        return float(self._busy_s[worker])

    @cached_property
    def _busy_s(self) -> np.ndarray:
        durations_s = column(self.spans, "end_s") - column(self.spans, "start_s")
        workers = column(self.spans, "worker").astype(int)
        return np.bincount(workers, weights=durations_s, minlength=self.num_workers)

    def utilisation(self, worker: int) -> float:
        """The share of the makespan in which a worker had something to do."""
        return self.busy_s(worker) / self.makespan_s if self.makespan_s else 1.0

    @property
    def bubble_share(self) -> float:
        """The share of the workers' time in which they waited: the pipeline's bubble."""
        shares = [self.utilisation(worker) for worker in range(self.num_workers)]
        return 1.0 - sum(shares) / len(shares) if self.spans else 0.0

    def window(self, start_s: float, stop_s: float) -> Timeline:
        """The part between two moments, cut where they fall; it begins at zero."""
        kept = [s for s in self.spans if s.end_s > start_s and s.start_s < stop_s]
        spans = tuple(
            s._replace(
                start_s=max(s.start_s, start_s) - start_s, end_s=min(s.end_s, stop_s) - start_s
            )
            for s in kept
        )
        return replace(self, spans=spans, transfers=(), memory=())

    @cached_property
    def link_bytes(self) -> dict[tuple[int, int], int]:
        """Bytes that each worker sent to each other one, by (source, target)."""
        source, target, sizes = (
            column(self.transfers, name).astype(int) for name in ("source", "target", "num_bytes")
        )
        links, link = np.unique(source * self.num_workers + target, return_inverse=True)
        sums = np.zeros(len(links), np.int64)
        np.add.at(sums, link, sizes)
        pairs = (divmod(number, self.num_workers) for number in links.tolist())
        return dict(zip(pairs, sums.tolist(), strict=True))

    def peak_bytes(self, worker: int) -> int:
        """The most that a worker held at once of stash and versions, in bytes."""
        mine = column(self.memory, "worker") == worker
        sums = column(self.memory, "stash_bytes") + column(self.memory, "version_bytes")
        return int(sums[mine].max(initial=0))

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.makespan_s * 1e3:.2f} ms, {self.bubble_share:.0%} bubble"]
        for worker in range(self.num_workers):
            lines.append(f"worker {worker}: {' '.join(map(str, self.spans_of(worker)))}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The timeline as JSON."""
        value = {"title": self.title, "num_workers": self.num_workers}
        return json.dumps(
            value
            | {"spans": [*self.spans], "transfers": [*self.transfers], "memory": [*self.memory]}
        )

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """Reads what `to_json` wrote."""
        value = json.loads(text)
        return cls(
            value["title"],
            value["num_workers"],
            tuple(Span(*entry) for entry in value["spans"]),
            tuple(Transfer(*entry) for entry in value["transfers"]),
            tuple(MemorySample(*entry) for entry in value["memory"]),
        )
