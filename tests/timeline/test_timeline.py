"""Timelines as values."""

from __future__ import annotations

import numpy as np
import pytest

from pdjax.timeline.rows import Rows
from pdjax.timeline.timeline import Span, Timeline


def timeline() -> Timeline:
    spans = [
        Span(0, "F", 0, 0, 5.0, 6.0),
        Span(1, "FB", 1, 0, 6.0, 8.0),
        Span(0, "B", 0, 0, 8.0, 9.0),
        Span(0, "U", 0, 0, 9.0, 9.0),
        Span(1, "U", 1, 0, 8.0, 9.0),
    ]
    return Timeline.of("example", 2, spans)


def test_figures():
    value = timeline()
    assert value.spans[0].start_s == 0
    assert value.makespan_s == 4
    assert [value.busy_s(worker) for worker in range(2)] == [2, 3]
    assert value.bubble_share == pytest.approx(3 / 8)


def test_text_and_json():
    value = timeline()
    assert "worker 0: 0F0 0B0 0U0" in str(value)
    assert Timeline.from_json(value.to_json()) == value


def test_empty():
    assert Timeline("nothing", 1, ()).bubble_share == 0


def test_a_span_that_ends_before_it_starts():
    with pytest.raises(ValueError, match="before it starts"):
        Timeline("late", 1, (Span(0, "F", 0, 0, 2.0, 1.0),))


def test_rows_are_the_tuple_of_their_entries():
    spans = (Span(0, "F", 0, 0, 1.0, 2.0), Span(1, "B", 1, 0, 2.0, 4.5))
    columns = {name: np.array([getattr(s, name) for s in spans]) for name in Span._fields}
    rows = Rows(Span, columns)
    assert rows == spans == tuple(rows)
    assert rows == Rows(Span, columns)
    assert rows != spans[:1]
    assert (len(rows), rows[1], rows[:1], repr(rows)) == (2, spans[1], spans[:1], repr(spans))
    assert hash(rows) == hash(spans)
    lazy, eager = Timeline("one", 2, rows), Timeline("one", 2, spans)
    assert lazy == eager
    assert (lazy.makespan_s, lazy.busy_s(1), str(lazy)) == (4.5, 2.5, str(eager))
    assert type(rows[0].worker) is int
