"""What happened when: the spans of every worker, as a value.

Measured by the executor (`Pipeline.record`) or computed. Nothing here imports JAX.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

SpanKind = Literal["F", "B", "FB", "U", "FBU"]
"""Forward pass, backward pass, both in one program, update of the weights, all in one program."""


@dataclass(frozen=True)
class Span:
    """One action of a worker in time.

    Attributes:
        worker: the worker.
        kind: what it did.
        stage: the stage that it did it for.
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

    def __post_init__(self) -> None:
        if not self.start_s <= self.end_s:
            raise ValueError(f"a span ends at {self.end_s} before it starts at {self.start_s}.")

    @property
    def duration_s(self) -> float:
        """How long it took, in seconds."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Timeline:
    """The spans of all workers.

    Attributes:
        title: what was run.
        num_workers: number of workers.
        spans: the spans, by start.
    """

    title: str
    num_workers: int
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, title: str, num_workers: int, spans: Iterable[Span]) -> Timeline:
        """Makes a timeline that begins at zero."""
        ordered = sorted(spans, key=lambda span: (span.start_s, span.worker))
        zero = ordered[0].start_s if ordered else 0.0
        shifted = (
            Span(s.worker, s.kind, s.stage, s.microbatch, s.start_s - zero, s.end_s - zero)
            for s in ordered
        )
        return cls(title, num_workers, tuple(shifted))

    @property
    def makespan_s(self) -> float:
        """From the first start to the last end, in seconds."""
        return max((span.end_s for span in self.spans), default=0.0)

    def busy_s(self, worker: int) -> float:
        """How long a worker had something to do, in seconds."""
        return sum(span.duration_s for span in self.spans if span.worker == worker)

    @property
    def idle_share(self) -> float:
        """The share of the workers' time in which they waited (the pipeline's bubble)."""
        total = self.makespan_s * self.num_workers
        busy = sum(self.busy_s(worker) for worker in range(self.num_workers))
        return 1.0 - busy / total if total else 0.0

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.makespan_s * 1e3:.2f} ms, {self.idle_share:.0%} idle"]
        for worker in range(self.num_workers):
            mine = [span for span in self.spans if span.worker == worker]
            work = " ".join(f"{s.stage}{s.kind}{s.microbatch}" for s in mine)
            lines.append(f"worker {worker}: {work}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The timeline as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """Reads what `to_json` wrote."""
        value = json.loads(text)
        spans = tuple(Span(**span) for span in value["spans"])
        return cls(value["title"], value["num_workers"], spans)
