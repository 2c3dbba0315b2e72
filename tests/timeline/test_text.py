"""Timelines as text."""

from __future__ import annotations

import re

import pytest
from timelines import every_kind, gpipe, interleaved

from pdjax.timeline.text import draw_timeline
from pdjax.timeline.timeline import Span, Timeline


def rows(text: str) -> list[str]:
    return [line.split("|")[1] for line in text.splitlines() if "|" in line and line[0] == "w"]


def test_a_small_one():
    assert draw_timeline(gpipe(2, 2, hop_s=0), width=52) == "\n".join(
        [
            "GPipe, 2 stages: makespan 9 s, bubble 33.3%",
            "worker 0 |F0--F1--            B0======B1=====U|  67%",
            "worker 1 |    F0--F1--B0======B1======U       |  67%",
            "       s  |0      |2      |4      |6      |8",
            "F: forward, B: backward, U: update",
        ]
    )


def test_split_backwards():
    text = draw_timeline(gpipe(2, 2, split=True, hop_s=0), width=60)
    assert rows(text) == [
        "F0----F1---           I0~~~~W0___I1~~~~W1__U",
        "      F0---F1----I0~~~W0____I1~~~W1____U    ",
    ]


@pytest.mark.parametrize("width", [40, 77, 100, 250])
@pytest.mark.parametrize("timeline", [gpipe(4, 8), gpipe(4, 8, split=True), interleaved()])
def test_spans_begin_and_end_at_their_columns(timeline, width):
    text = draw_timeline(timeline, width)
    assert max(map(len, text.splitlines())) <= width
    for worker, row in enumerate(rows(text)):
        assert len(row) == width - len("worker 0 || 100%")
        scale = len(row) / timeline.makespan_s
        covered = [" "] * len(row)
        for span in timeline.spans_of(worker):
            first, end = int(span.start_s * scale + 0.5), int(span.end_s * scale + 0.5)
            if end > first:
                assert row[first].upper() == span.kind
                covered[first:end] = "x" * (end - first)
        gaps = [cell for cell, box in zip(row, covered, strict=True) if box == " "]
        assert set(gaps) <= {" ", "U"}
        assert " " not in [cell for cell, box in zip(row, covered, strict=True) if box == "x"]


def test_an_update_that_takes_no_time_has_a_letter():
    spans = [Span(0, "B", 0, 0, 0, 1), Span(0, "U", 0, 0, 1, 1), Span(0, "F", 0, 1, 1, 2)]
    (row,) = rows(draw_timeline(Timeline.of("x", 1, spans), width=40))
    assert row == "B0=========UF1----------"


def test_stages_of_a_worker():
    text = draw_timeline(interleaved(), width=76)
    assert rows(text) == [
        "F0.0-     f0.2-               b0.2======          B0.0======",
        "     F0.1-     f0.3-b0.3======          B0.1======          ",
    ]
    assert "small letters" in text
    # the number of a stage never stands right before the next letter
    assert rows(draw_timeline(interleaved(), width=64))[1].startswith("    F0--    f0--b0.3====  ")


def test_the_legend_has_what_is_there():
    text = draw_timeline(every_kind(), width=200)
    for kind in ("F", "B", "I", "W", "FB", "FBU", "U"):
        assert f"{kind}: " in text
    assert "weight" not in draw_timeline(gpipe(2, 2), width=200)
    assert "left out" not in text


def test_spans_shorter_than_a_column_are_counted():
    text = draw_timeline(gpipe(8, 256), width=100)
    drawn = sum(len(re.findall("[FBU]", row)) for row in rows(text))
    left_out = 8 * (2 * 256 + 1) - drawn
    assert left_out > 0
    assert f"{left_out} of {8 * 513} are shorter than a column" in " ".join(text.split())


def test_colors_change_no_character():
    timeline = gpipe(4, 8, split=True)
    plain, colored = draw_timeline(timeline), draw_timeline(timeline, color=True)
    assert "\x1b" not in plain
    assert colored.count("\x1b[0m") > 4 * 8
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain


def test_nothing():
    text = draw_timeline(Timeline("nothing", 2, ()))
    assert [row.strip() for row in rows(text)] == ["", ""]


def test_too_narrow():
    with pytest.raises(ValueError, match="width of 20; expected at least 40 columns"):
        draw_timeline(gpipe(2, 2), width=20)
