"""Pictures of timelines: what is drawn, where, and whether one can tell it apart."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from timelines import every_kind, gpipe, interleaved

from pdjax.timeline.figure import save_timeline, save_timelines, timelines_figure
from pdjax.timeline.memory_figure import memory_figure, save_memory
from pdjax.timeline.style import NAMES, STYLES, grey
from pdjax.timeline.timeline import Span, SpanKind, Timeline, Transfer

EXAMPLES = [gpipe(4, 8), gpipe(4, 8, split=True), interleaved(), every_kind()]


def boxes(axes: Axes) -> dict[str, list[tuple[float, float, float, float]]]:
    """Start, end, top and bottom of the boxes by the name of their collection."""
    found = {}
    for collection in axes.collections:
        assert isinstance(collection, PolyCollection)
        if collection.get_gid() is not None:
            corners = [np.asarray(path.vertices) for path in collection.get_paths()]
            found[collection.get_gid()] = [
                (*np.sort(np.unique(xy[:, 0]))[[0, -1]], xy[:, 1].min(), xy[:, 1].max())
                for xy in corners
            ]
    return found


def numbers(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("timeline", EXAMPLES, ids=lambda timeline: timeline.title)
def test_every_span_and_transfer_is_a_box(timeline):
    drawn = boxes(timelines_figure([timeline]).axes[0])
    expected = Counter(f"{span.kind}{span.microbatch % 2}" for span in timeline.spans)
    expected += Counter(f"sent-{transfer.kind}" for transfer in timeline.transfers)
    assert {name: len(those) for name, those in drawn.items()} == expected


@pytest.mark.parametrize("timeline", EXAMPLES, ids=lambda timeline: timeline.title)
def test_boxes_are_in_the_worker_s_row_at_the_time_of_the_span(timeline):
    drawn = boxes(timelines_figure([timeline]).axes[0])
    found = {
        (name, round((top + bottom) / 2), start, end)
        for name, those in drawn.items()
        for start, end, top, bottom in those
        if abs((top + bottom) / 2 - round((top + bottom) / 2)) < 0.5
    }
    spans = {
        (f"{span.kind}{span.microbatch % 2}", span.worker, span.start_s, span.end_s)
        for span in timeline.spans
    }
    sent = {(f"sent-{t.kind}", t.source, t.start_s, t.end_s) for t in timeline.transfers}
    assert found == spans | sent


def test_transfers_lie_below_the_spans_a_lane_for_each_kind():
    drawn = boxes(timelines_figure([gpipe(3, 4)]).axes[0])
    heights = {
        name: {(top, bottom) for _, _, top, bottom in drawn[name] if round(top) == 1}
        for name in ("F0", "B1", "sent-F", "sent-B")
    }
    assert heights["F0"] == heights["B1"]
    (spans,), (forward,), (backward,) = heights["F0"], heights["sent-F"], heights["sent-B"]
    assert spans[1] <= forward[0] < forward[1] <= backward[0] + 1e-9


def test_an_all_reduce_has_its_own_lane():
    spans = (Span(0, "B", 0, 0, 0.0, 1.0), Span(1, "B", 0, 1, 0.0, 1.0))
    sent = (Transfer(0, 1, "R", 0, 1, 5, 1.0, 2.0), Transfer(1, 0, "R", 0, 1, 5, 1.0, 2.0))
    figure = timelines_figure([Timeline("replicas", 2, spans, sent)])
    assert len(boxes(figure.axes[0])["sent-R"]) == 2
    assert "gradients all-reduced" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_an_update_is_seen_that_takes_no_time():
    axes = timelines_figure([gpipe(2, 3)]).axes[0]
    (update,) = [c for c in axes.collections if str(c.get_gid()).startswith("U")]
    assert float(np.min(update.get_linewidth())) >= 1
    assert to_hex(np.asarray(update.get_edgecolor())[0]) == STYLES["U"].fills[0]
    assert update.get_zorder() > max(c.get_zorder() for c in axes.collections if c is not update)


@pytest.mark.parametrize(
    ("timeline", "names"),
    [
        (gpipe(2, 3, hop_s=0), ["forward", "backward", "update"]),
        (
            gpipe(2, 3, split=True),
            "forward,input gradients,weight gradients,update,activations sent,cotangents sent"
            "".split(","),
        ),
        (every_kind(), list(NAMES.values())),
    ],
)
def test_the_legend_has_what_is_there(timeline, names):
    (legend,) = timelines_figure([timeline]).legends
    assert [text.get_text() for text in legend.get_texts()] == names


def test_the_title_says_makespan_and_bubble():
    axes = timelines_figure([gpipe(2, 2, hop_s=0)]).axes[0]
    assert axes.get_title(loc="left") == "GPipe, 2 stages: makespan 9 s, bubble 33.3%"


def test_kinds_differ_in_black_and_white():
    """Each kind has a range of brightness of its own, or is hatched; so has every parity."""
    plain: tuple[SpanKind, ...] = ("F", "I", "B", "W")
    for one, other in combinations(plain, 2):
        distance = min(
            abs(grey(a) - grey(b)) for a in STYLES[one].fills for b in STYLES[other].fills
        )
        assert distance > 0.08, (one, other)
    for even, odd in (STYLES[kind].fills for kind in (*plain, "FB", "FBU")):
        assert grey(odd) - grey(even) > 0.07
    assert not any(STYLES[kind].hatch for kind in plain)
    assert len({STYLES["FB"].hatch, STYLES["FBU"].hatch, ""}) == 3


def test_numbers_stand_out_from_their_boxes():
    axes = timelines_figure([every_kind()]).axes[0]
    spans = [span for span in every_kind().spans if span.kind != "U"]
    for span, text in zip(spans, axes.texts, strict=True):
        bright = 1.0 if text.get_color() == "white" else 0.0
        assert abs(bright - grey(STYLES[span.kind].fills[span.microbatch % 2])) > 0.4, span


def test_all_numbers_are_there_for_eight_workers_and_32_microbatches():
    timeline = gpipe(8, 32)
    axes = timelines_figure([timeline]).axes[0]
    spans = [span for span in timeline.spans if span.kind != "U"]
    assert numbers(axes) == [str(span.microbatch) for span in spans]
    for span, text in zip(spans, axes.texts, strict=True):
        assert text.get_position()[0] == pytest.approx((span.start_s + span.end_s) / 2)
        assert abs(text.get_position()[1] - span.worker) < 0.42


def test_numbers_fit_their_boxes():
    """Measured on the drawn picture, with the font's own widths."""
    figure = timelines_figure([gpipe(8, 32)])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    spans = [span for span in gpipe(8, 32).spans if span.kind != "U"]
    for span, text in zip(spans, axes.texts, strict=True):
        left, right = axes.transData.transform([(span.start_s, 0), (span.end_s, 0)])[:, 0]
        extent = text.get_window_extent()
        assert left <= extent.x0, span
        assert extent.x1 <= right, span


def test_numbers_that_do_not_fit_are_left_out():
    spans = [Span(0, "F", 0, 0, 0.0, 1.0), Span(0, "B", 0, 1, 1.0, 1.00001)]
    spans += [Span(0, "F", 0, number, number + 1.0, number + 2.0) for number in range(2, 9)]
    axes = timelines_figure([Timeline.of("a short one", 1, spans)]).axes[0]
    assert numbers(axes) == ["0", *"2345678"]


def test_many_boxes_are_few_artists():
    axes = timelines_figure([gpipe(64, 64)]).axes[0]
    assert len(axes.collections) < 10


def test_stages_of_a_worker_lie_below_each_other():
    figure = timelines_figure([interleaved()])
    axes = figure.axes[0]
    tops = {start: top for start, _, top, _ in boxes(axes)["F0"]}
    assert tops[2.0] - tops[0.0] == pytest.approx(tops[3.0] - tops[1.0])
    assert tops[2.0] - tops[0.0] > 0.1
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["worker 0\nstages 0, 2", "worker 1\nstages 1, 3"]
    assert "the stages of a worker" in figure.legends[0].get_title().get_text()


def test_a_worker_s_stage_is_named_if_it_has_another_number():
    spans = [Span(0, "F", 1, 0, 0.0, 1.0), Span(1, "F", 0, 0, 0.0, 1.0)]
    axes = timelines_figure([Timeline.of("turned round", 2, spans)]).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["worker 0\nstage 1", "worker 1\nstage 0"]


def test_panels_have_one_time_axis():
    short, long = gpipe(2, 2), gpipe(4, 8)
    figure = timelines_figure([short, long])
    assert len(figure.axes) == 2
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert figure.axes[0].get_xlim()[1] >= long.makespan_s
    assert len(figure.legends) == 1


@pytest.mark.parametrize(
    ("size_s", "name"), [(3.0, "seconds"), (3e-3, "milliseconds"), (3e-7, "microseconds")]
)
def test_the_time_axis_has_a_unit(size_s, name):
    axes = timelines_figure([Timeline("x", 1, (Span(0, "F", 0, 0, 0.0, size_s),))]).axes[0]
    assert axes.get_xlabel() == name


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_files(tmp_path, suffix, magic):
    path = tmp_path / f"timeline.{suffix}"
    save_timelines([gpipe(2, 3), interleaved(), every_kind(), Timeline("nothing", 2, ())], path)
    assert path.read_bytes().startswith(magic)
    again = tmp_path / f"again.{suffix}"
    save_timeline(gpipe(2, 3), again)
    first = again.read_bytes()
    save_timeline(gpipe(2, 3), again)
    assert again.read_bytes() == first


@pytest.mark.parametrize("name", ["timeline.jpg", "timeline"])
def test_an_unknown_suffix(tmp_path, name):
    with pytest.raises(ValueError, match=r"expected \.png or \.svg"):
        save_timeline(gpipe(2, 2), tmp_path / name)
    with pytest.raises(ValueError, match=r"expected \.png or \.svg"):
        save_memory([gpipe(2, 2)], tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [save_timelines, save_memory])
def test_nothing_to_draw(tmp_path, save):
    with pytest.raises(ValueError, match="no timelines; expected at least one"):
        save([], tmp_path / "x.png")


# ---------------------------------------------------------------- memory


def test_memory_is_a_step_for_each_entry():
    timeline = gpipe(2, 3)
    axes = memory_figure([timeline]).axes[0]
    lines = {line.get_gid(): line for line in axes.lines}
    for worker in range(2):
        held = [entry for entry in timeline.memory if entry.worker == worker]
        line = lines[f"held-{worker}"]
        assert line.get_drawstyle() == "steps-post"
        times, heights = np.asarray(line.get_data())
        # the bottom of the row is nothing, its top is the most that any worker holds
        bytes_ = (worker + 0.42 - heights) / 0.84 * 130
        found = dict(zip(times, bytes_, strict=True))
        for entry in {entry.time_s: entry for entry in held}.values():
            assert found[entry.time_s] == pytest.approx(entry.stash_bytes + entry.version_bytes)
        assert times[-1] == timeline.makespan_s


def test_memory_says_the_peaks():
    axes = memory_figure([gpipe(2, 3)]).axes[0]
    assert numbers(axes) == ["130 B", "130 B"]
    assert axes.get_title(loc="left") == "GPipe, 2 stages: at most 130 B"


def test_memory_that_was_not_followed(tmp_path):
    with pytest.raises(ValueError, match="'interleaved' does not say what the workers held"):
        save_memory([gpipe(2, 2), interleaved()], tmp_path / "memory.png")
    save_memory([gpipe(2, 2), gpipe(3, 4)], tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
