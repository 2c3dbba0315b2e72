"""Timelines as trace files, which Perfetto (ui.perfetto.dev) and chrome://tracing show.

The Trace Event Format: a list of events, each of which says what it is (`ph`), where it belongs
(`pid`, `tid`) and when it was (`ts`, in microseconds). Here a timeline is a process, a worker a
thread of it, and a link another one; so simulated and measured lie beside each other:

    1F1B, simulated     worker 0      F0 F1 F2 F3 ...
                        link 0 → 1      -- -- --      with an arrow to what waits for it
    1F1B, measured      worker 0      F0 F1 F2 F3 ...

Nothing here imports JAX.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from pdjax.timeline.perfetto_arrows import Slice, find_arrows
from pdjax.timeline.style import NAMES, STYLES, TRANSFER_STYLES, check_suffix
from pdjax.timeline.timeline import Span, Timeline, Transfer

_Event = dict[str, Any]


def save_trace(timelines: Timeline | Sequence[Timeline], path: str | PathLike[str]) -> None:
    """Writes a trace file, as `to_trace_json` makes it.

    Args:
        timelines: the timelines: one, or several beside each other.
        path: the file, a .json one.

    Raises:
        ValueError: if the suffix is another one.
    """
    check_suffix(path, (".json",))
    Path(path).write_text(to_trace_json(timelines), encoding="utf-8")


def to_trace_json(timelines: Timeline | Sequence[Timeline]) -> str:
    """Timelines in the Trace Event Format.

    Each is a process; its workers, and the links on which something was sent, are the threads.
    Arrows lead from the span that made a value over its transfer to the span that waited for it;
    where transfers were not followed, from stage to stage. The bytes that a worker holds are a
    counter.

    Args:
        timelines: the timelines: one, or several beside each other.

    Returns:
        The text of the file.
    """
    several = [timelines] if isinstance(timelines, Timeline) else list(timelines)
    # no thread has the number of a process: viewers take it for the main thread
    tids, arrows = count(len(several) + 1), count(1)
    processes = (
        _process(timeline, pid, tids, arrows) for pid, timeline in enumerate(several, start=1)
    )
    return json.dumps({"traceEvents": list(chain.from_iterable(processes))})


class _Thread(NamedTuple):
    """A row of a viewer, on which nothing overlaps."""

    tid: int
    name: str
    slices: tuple[Slice, ...]


def _process(
    timeline: Timeline, pid: int, tids: Iterator[int], arrows: Iterator[int]
) -> Iterator[_Event]:
    threads = _threads(timeline, tids)
    yield _metadata("process_name", pid, threads[0].tid, name=timeline.title)
    yield _metadata("process_sort_index", pid, threads[0].tid, sort_index=pid)
    for place, thread in enumerate(threads):
        yield _metadata("thread_name", pid, thread.tid, name=thread.name)
        yield _metadata("thread_sort_index", pid, thread.tid, sort_index=place)
    events = [*_timed(threads, pid, arrows), *_counters(timeline, pid, threads)]
    yield from sorted(events, key=lambda event: event["ts"])


def _metadata(what: str, pid: int, tid: int, **args: str | int) -> _Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _threads(timeline: Timeline, tids: Iterator[int]) -> list[_Thread]:
    """The workers, each followed by the links on which it sends."""
    sent: defaultdict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for transfer in timeline.transfers:
        sent[transfer.source, transfer.target].append(transfer)
    threads = []
    for worker in range(timeline.num_workers):
        threads += _lanes(f"worker {worker}", timeline.spans_of(worker), tids)
        for source, target in sorted(sent):
            if source == worker:
                threads += _lanes(f"link {source} → {target}", sent[source, target], tids)
    return threads


def _lanes(
    name: str, entries: Iterable[Span] | Iterable[Transfer], tids: Iterator[int]
) -> list[_Thread]:
    """One thread; more if entries overlap, which no viewer shows on one."""
    lanes: list[list[tuple[Span | Transfer, int, int]]] = [[]]
    for entry in sorted(entries, key=lambda entry: (entry.start_s, entry.end_s)):
        start, end = round(entry.start_s * 1e9), round(entry.end_s * 1e9)
        # rounded times may overlap by a nanosecond where the true ones touch
        lane = next((lane for lane in lanes if not lane or lane[-1][2] <= start + 1), None)
        if lane is None:
            lanes.append(lane := [])
        start = max(start, lane[-1][2]) if lane else start
        lane.append((entry, start, max(start, end)))
    threads = []
    for number, lane in enumerate(lanes, start=1):
        tid = next(tids)
        slices = tuple(Slice(entry, tid, start, end) for entry, start, end in lane)
        threads.append(_Thread(tid, f"{name} ({number})" if number > 1 else name, slices))
    return threads


def _timed(threads: Sequence[_Thread], pid: int, arrows: Iterator[int]) -> Iterator[_Event]:
    """The slices and their arrows, each slice followed by the ends of arrows that are tied to it.

    An arrow's end is tied to the slice that the viewer opened last on the thread, so a slice that
    takes no time and the one after it must not come before both their arrows.
    """
    slices = [piece for thread in threads for piece in thread.slices]
    ends: defaultdict[Slice, list[_Event]] = defaultdict(list)
    for giver, taker in find_arrows(slices):
        shared = {"name": "needed", "cat": "dependency", "id": next(arrows), "pid": pid}
        # within the slice: at its very end it is closed already
        last_ns = max(giver.start_ns, giver.end_ns - 1)
        ends[giver].append({"ph": "s", **shared, "tid": giver.tid, "ts": last_ns / 1e3})
        ends[taker].append(
            {"ph": "f", "bp": "e", **shared, "tid": taker.tid, "ts": taker.start_ns / 1e3}
        )
    for piece in slices:
        yield _complete(piece, pid)
        yield from ends[piece]


def _complete(piece: Slice, pid: int) -> _Event:
    entry = piece.entry
    event: _Event = {
        "ph": "X",
        "pid": pid,
        "tid": piece.tid,
        "ts": piece.start_ns / 1e3,
        "dur": (piece.end_ns - piece.start_ns) / 1e3,
        "args": {"stage": entry.stage, "microbatch": entry.microbatch},
    }
    if isinstance(entry, Span):
        color = STYLES[entry.kind].trace
        return event | {"name": str(entry), "cat": NAMES[entry.kind], "cname": color}
    name = f"{entry.stage}{entry.kind}{entry.microbatch} sent"
    event["args"]["bytes"] = entry.num_bytes
    return event | {"name": name, "cat": TRANSFER_STYLES[entry.kind].name}


def _counters(timeline: Timeline, pid: int, threads: Sequence[_Thread]) -> Iterator[_Event]:
    tids = {thread.name: thread.tid for thread in threads}
    for held in timeline.memory:
        yield {
            "ph": "C",
            "name": f"worker {held.worker} holds, in bytes",
            "pid": pid,
            "tid": tids[f"worker {held.worker}"],
            "ts": round(held.time_s * 1e9) / 1e3,
            "args": {"versions": held.version_bytes, "stash": held.stash_bytes},
        }
