"""Timelines in closed form, to draw."""

from __future__ import annotations

from pdjax.timeline.timeline import MemorySample, Span, Timeline, Transfer


def gpipe(stages: int, microbatches: int, *, split: bool = False, hop_s: float = 0.25) -> Timeline:
    """All forwards (a second each), then all backwards (two), then updates that take no time.

    Args:
        stages: each on a worker of its own.
        microbatches: how many.
        split: whether a backward is its two parts.
        hop_s: how long a transfer takes; transfers are not followed if it is 0.
    """
    spans, transfers, memory = [], [], []
    middle = stages + microbatches - 1 + (stages - 1) * hop_s
    back = (1 if split else 2) + hop_s  # from a stage to the one before
    for s in range(stages):
        memory.append(MemorySample(s, 0.0, 0, 100))
        for m in range(microbatches):
            start = m + s * (1 + hop_s)
            spans.append(Span(s, "F", s, m, start, start + 1))
            memory.append(MemorySample(s, start, 10 * (m + 1), 100))
            if s + 1 < stages:
                transfers.append(Transfer(s, s + 1, "F", s, m, 10, start + 1, start + 1 + hop_s))
            start = middle + (stages - 1 - s) * back + 2 * m
            sent = start + (1 if split else 2)
            spans.append(Span(s, "I" if split else "B", s, m, start, sent))
            if split:
                spans.append(Span(s, "W", s, m, sent, sent + 1))
            memory.append(MemorySample(s, start + 2, 10 * (microbatches - m - 1), 100))
            if s:
                transfers.append(Transfer(s, s - 1, "B", s, m, 10, sent, sent + hop_s))
        spans.append(Span(s, "U", s, microbatches - 1, start + 2, start + 2))
    return Timeline(
        f"GPipe, {stages} stages",
        stages,
        tuple(sorted(spans, key=lambda span: (span.start_s, span.worker))),
        tuple(sorted(transfers, key=lambda sent: sent.start_s)) if hop_s else (),
        tuple(sorted(memory, key=lambda held: held.time_s)),
    )


def interleaved() -> Timeline:
    """Two workers with two stages each: 0 and 2, 1 and 3."""
    spans = []
    for step, stage in enumerate((0, 1, 2, 3)):
        spans.append(Span(stage % 2, "F", stage, 0, step, step + 1))
        spans.append(Span(stage % 2, "B", stage, 0, 10 - 2 * step, 12 - 2 * step))
    return Timeline.of("interleaved", 2, spans)


def every_kind() -> Timeline:
    """A worker that does one of each kind, for an even and an odd microbatch."""
    spans = []
    for kind in ("F", "B", "I", "W", "FB", "FBU", "U"):
        for microbatch in (0, 1):
            start = float(len(spans))
            spans.append(Span(0, kind, 0, microbatch, start, start + 1))
    return Timeline.of("every kind", 1, spans)
