"""Trace files: their structure, as viewers take it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from timelines import every_kind, gpipe, interleaved

from pdjax.timeline.perfetto import save_trace, to_trace_json
from pdjax.timeline.timeline import MemorySample, Span, Timeline, Transfer

REQUIRED = {
    "M": {"name", "args"},
    "X": {"name", "cat", "dur", "args"},
    "C": {"name", "args"},
    "s": {"name", "cat", "id"},
    "f": {"name", "cat", "id", "bp"},
}
EXAMPLES = {
    "transfers": [gpipe(4, 8)],
    "split": [gpipe(3, 4, split=True)],
    "no transfers": [gpipe(3, 4, hop_s=0)],
    "several": [gpipe(4, 8), gpipe(4, 8, split=True, hop_s=0), interleaved(), every_kind()],
    "nothing": [Timeline("nothing", 2, ())],
}


def events(*timelines: Timeline) -> list[dict]:
    return json.loads(to_trace_json(timelines))["traceEvents"]


def of(found: list[dict], phase: str) -> list[dict]:
    return [event for event in found if event["ph"] == phase]


def slices(found: list[dict]) -> list[tuple[int, int, float, float]]:
    return [(e["pid"], e["tid"], e["ts"], e["ts"] + e["dur"]) for e in of(found, "X")]


def arrows(found: list[dict]) -> list[tuple[str, str]]:
    """What each arrow leads from and to, as a viewer finds it: the slice opened last."""
    ends: dict[int, list[str]] = defaultdict(list)
    opened: dict[int, dict] = {}
    for event in found:
        if event["ph"] == "X":
            opened[event["tid"]] = event
        elif event["ph"] in "sf":
            piece = opened[event["tid"]]
            assert piece["ts"] <= event["ts"] <= piece["ts"] + piece["dur"]
            assert len(ends[event["id"]]) == "sf".index(event["ph"])
            ends[event["id"]].append(piece["name"])
    assert all(len(pair) == 2 for pair in ends.values())
    return sorted((first, second) for first, second in ends.values())


@pytest.mark.parametrize("timelines", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_every_event_has_what_its_phase_needs(timelines):
    found = events(*timelines)
    for event in found:
        assert REQUIRED[event["ph"]] | {"ph", "pid", "tid", "ts"} <= event.keys()
        assert event["ts"] >= 0
        assert event.get("dur", 0) >= 0
        assert event.get("bp", "e") == "e"
    for pid in range(1, len(timelines) + 1):
        times = [event["ts"] for event in found if event["pid"] == pid and event["ph"] != "M"]
        assert times == sorted(times)


@pytest.mark.parametrize("timelines", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_nothing_overlaps_on_a_thread(timelines):
    by_thread = defaultdict(list)
    for _, tid, start, end in slices(events(*timelines)):
        by_thread[tid].append((start, end))
    for those in by_thread.values():
        those.sort()
        for (_, end), (start, _) in pairwise(those):
            assert end <= start + 1e-6


@pytest.mark.parametrize("timelines", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_threads_and_processes_are_named_and_sorted(timelines):
    found = events(*timelines)
    named: dict[str, dict] = defaultdict(dict)
    for event in of(found, "M"):
        key = event["pid"] if event["name"].startswith("process") else event["tid"]
        assert key not in named[event["name"]]
        named[event["name"]][key] = event["args"]
    titles = [args["name"] for args in named["process_name"].values()]
    assert titles == [timeline.title for timeline in timelines]
    assert named["process_sort_index"].keys() == named["process_name"].keys()
    assert named["thread_sort_index"].keys() == named["thread_name"].keys()
    assert {event["tid"] for event in found} <= named["thread_name"].keys()
    # a thread that has the number of a process is taken for its main thread
    assert not named["thread_name"].keys() & named["process_name"].keys()


def test_every_span_and_transfer_is_a_slice():
    timeline = gpipe(3, 4)
    found = of(events(timeline), "X")
    assert Counter(event["name"] for event in found) == Counter(
        [str(span) for span in timeline.spans]
        + [f"{sent.stage}{sent.kind}{sent.microbatch} sent" for sent in timeline.transfers]
    )
    (event,) = [event for event in found if event["name"] == "2B1"]
    (span,) = [span for span in timeline.spans if str(span) == "2B1"]
    assert event["ts"] == pytest.approx(span.start_s * 1e6)
    assert event["dur"] == pytest.approx(span.duration_s * 1e6)
    assert event["args"] == {"stage": 2, "microbatch": 1}


def test_workers_and_links_are_threads():
    found = of(events(gpipe(3, 2)), "M")
    names = [event["args"]["name"] for event in found if event["name"] == "thread_name"]
    assert names == [
        "worker 0",
        "link 0 → 1",
        "worker 1",
        "link 1 → 0",
        "link 1 → 2",
        "worker 2",
        "link 2 → 1",
    ]


def test_arrows_lead_over_the_transfers():
    assert arrows(events(gpipe(2, 1))) == [
        ("0F0", "0F0 sent"),
        ("0F0 sent", "1F0"),
        ("1B0", "1B0 sent"),
        ("1B0 sent", "0B0"),
    ]


def test_arrows_lead_from_stage_to_stage_without_transfers():
    assert arrows(events(gpipe(3, 1, split=True, hop_s=0))) == [
        ("0F0", "1F0"),
        ("1F0", "2F0"),
        ("1I0", "0I0"),
        ("2I0", "1I0"),
    ]


def test_every_transfer_has_both_arrows():
    timeline = gpipe(4, 8, split=True)
    assert len(arrows(events(timeline))) == 2 * len(timeline.transfers)


def test_arrows_between_interleaved_stages():
    assert arrows(events(interleaved())) == [
        ("0F0", "1F0"),
        ("1B0", "0B0"),
        ("1F0", "2F0"),
        ("2B0", "1B0"),
        ("2F0", "3F0"),
        ("3B0", "2B0"),
    ]


def test_an_arrow_over_a_transfer_that_takes_no_time():
    spans = (Span(0, "F", 0, 0, 0.0, 1.0), Span(1, "FBU", 1, 0, 1.0, 2.0))
    sent = (Transfer(0, 1, "F", 0, 0, 5, 1.0, 1.0),)
    assert arrows(events(Timeline("x", 2, spans, sent))) == [("0F0", "1FBU0")]


def test_an_arrow_over_an_all_reduce_to_an_update_that_takes_no_time():
    spans = (
        Span(0, "W", 0, 0, 0.0, 1.0),
        Span(1, "W", 0, 1, 0.0, 1.0),
        Span(0, "U", 0, 1, 2.0, 2.0),
        Span(0, "F", 0, 2, 2.0, 3.0),
    )
    sent = (Transfer(1, 0, "R", 0, 1, 5, 1.0, 2.0),)
    assert arrows(events(Timeline("x", 2, spans, sent))) == [
        ("0R1 sent", "0U1"),
        ("0W1", "0R1 sent"),
    ]


def test_an_all_reduce_leads_to_the_update_of_its_stage():
    spans = (
        Span(0, "B", 1, 0, 0.0, 1.0),
        Span(0, "U", 0, 0, 2.0, 3.0),
        Span(0, "U", 1, 0, 3.0, 4.0),
    )
    sent = (Transfer(0, 0, "R", 1, 0, 5, 1.0, 2.0),)
    assert ("1R0 sent", "1U0") in arrows(events(Timeline("x", 1, spans, sent)))


@pytest.mark.parametrize(
    "spans",
    [
        # measured: it seems to have begun before its input was there
        (Span(0, "F", 0, 0, 0.0, 1.0), Span(1, "F", 1, 0, 0.9, 2.0)),
        # nothing travels
        (Span(0, "F", 0, 0, 0.0, 1.0), Span(0, "F", 1, 0, 1.0, 2.0)),
        # a viewer finds nothing at which the arrow could begin
        (Span(0, "F", 0, 0, 1.0, 1.0), Span(1, "F", 1, 0, 1.0, 2.0)),
        # another microbatch
        (Span(0, "F", 0, 0, 0.0, 1.0), Span(1, "F", 1, 1, 1.0, 2.0)),
    ],
)
def test_no_arrow(spans):
    assert arrows(events(Timeline("x", 2, spans))) == []


def test_no_arrow_from_what_takes_no_time_to_its_transfer():
    spans = (Span(0, "F", 0, 0, 1.0, 1.0), Span(1, "F", 1, 0, 2.0, 3.0))
    sent = (Transfer(0, 1, "F", 0, 0, 5, 1.0, 2.0),)
    assert arrows(events(Timeline("x", 2, spans, sent))) == [("0F0 sent", "1F0")]


def test_what_overlaps_has_a_thread_of_its_own():
    spans = (Span(0, "F", 0, 0, 0.0, 2.0), Span(0, "F", 0, 1, 1.0, 3.0))
    found = events(Timeline("x", 1, spans))
    names = [e["args"]["name"] for e in of(found, "M") if e["name"] == "thread_name"]
    assert names == ["worker 0", "worker 0 (2)"]
    assert len({event["tid"] for event in of(found, "X")}) == 2


def test_times_that_touch_do_not_overlap():
    """0.1 + 0.2 is a little more than 0.3."""
    spans = (Span(0, "F", 0, 0, 0.1, 0.1 + 0.2), Span(0, "F", 0, 1, 0.3, 0.4))
    assert len({tid for _, tid, _, _ in slices(events(Timeline("x", 1, spans)))}) == 1
    close = (Span(0, "F", 0, 0, 0.0, 1.6e-9), Span(0, "F", 0, 1, 1.4e-9, 1.0))
    found = slices(events(Timeline("x", 1, close)))
    assert [tid for _, tid, _, _ in found] == [found[0][1]] * 2
    assert found[0][3] <= found[1][2]


def test_held_bytes_are_counters():
    memory = (MemorySample(0, 0.0, 0, 7), MemorySample(1, 0.0, 0, 8), MemorySample(0, 0.5, 3, 7))
    timeline = Timeline("x", 2, (Span(0, "F", 0, 0, 0.0, 1.0),), (), memory)
    counters = of(events(timeline), "C")
    assert [(event["name"], event["ts"], event["args"]) for event in counters] == [
        ("worker 0 holds, in bytes", 0.0, {"versions": 7, "stash": 0}),
        ("worker 1 holds, in bytes", 0.0, {"versions": 8, "stash": 0}),
        ("worker 0 holds, in bytes", 5e5, {"versions": 7, "stash": 3}),
    ]


def test_files(tmp_path):
    path = tmp_path / "trace.json"
    save_trace(gpipe(2, 2), path)
    assert path.read_text(encoding="utf-8") == to_trace_json([gpipe(2, 2)])
    with pytest.raises(ValueError, match=r"ends in '\.png'; expected \.json"):
        save_trace(gpipe(2, 2), tmp_path / "trace.png")
