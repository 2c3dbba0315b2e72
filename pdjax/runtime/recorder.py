"""Measures when the programs of a pipeline run.

Dispatch returns at once, so the end of a program has to be waited for. A thread for each worker
does so, in the order in which the worker runs its programs, while the main thread goes on
dispatching.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import jax

from pdjax.distributed import Peers
from pdjax.runtime.replica_map import ReplicaMap
from pdjax.schedules import Schedule
from pdjax.schedules.action import KINDS, Result
from pdjax.schedules.lower import ProgramKind
from pdjax.timeline.timeline import Span, Timeline, actions_of


@dataclass
class Event:
    """A program that was dispatched; `done_s` is set when its results are ready."""

    kind: ProgramKind
    worker: int
    stage: int
    microbatch: int
    dispatched_s: float
    done_s: float = 0.0


Ends = dict[tuple[Result, int, int], float]
"""When results were ready, by result, stage and microbatch."""


class Recorder:
    """Notes every dispatch (`observe`), and waits for all dispatched programs (`finish`)."""

    def __init__(self, schedule: Schedule, weights: Iterable[jax.Array]) -> None:
        """Starts the threads.

        Args:
            schedule: the schedule that is run.
            weights: one of the weights of each stage; the program that `observe` needs is compiled
                for it.
        """
        for leaf in weights:
            _touch(leaf)
        self._schedule = schedule
        self._replicas = ReplicaMap.of(schedule)
        self._events: list[Event] = []
        self._queues: list[queue.SimpleQueue[tuple[Event, Any] | None]] = []
        self._threads: list[threading.Thread] = []
        for _ in schedule.workers:
            waiting: queue.SimpleQueue[tuple[Event, Any] | None] = queue.SimpleQueue()
            thread = threading.Thread(target=_wait_for_each, args=(waiting,), daemon=True)
            thread.start()
            self._queues.append(waiting)
            self._threads.append(thread)

    def observe(self, kind: ProgramKind, replica: int, microbatch: int, outputs: Any) -> None:
        """Notes that a program was dispatched, and waits for it elsewhere."""
        stage, worker = self._replicas.stage_of[replica], self._replicas.worker_of[replica]
        event = Event(kind, worker, stage, microbatch, time.perf_counter())
        self._events.append(event)
        self._queues[worker].put((event, _lasting(kind, outputs)))

    def finish(self) -> list[Event]:
        """Waits for all dispatched programs; returns their events in order."""
        for waiting in self._queues:
            waiting.put(None)
        for thread in self._threads:
            thread.join()
        return self._events


def gather(peers: Peers, events: Sequence[Event]) -> list[Event]:
    """The events of all processes, by the clock of the first one.

    Clocks are compared at a moment when all have just met, so that those of different hosts are off
    by the time that a message takes.
    """
    peers.exchange("end of the recording", None)
    local = [time.perf_counter(), [astuple(event) for event in events]]
    reported = peers.exchange("the recorded events", local)
    found = []
    for now, theirs in reported:
        for values in theirs:
            event, ahead = Event(*values), now - reported[0][0]
            event.dispatched_s, event.done_s = event.dispatched_s - ahead, event.done_s - ahead
            found.append(event)
    return found


def timeline_of(schedule: Schedule, events: Sequence[Event]) -> Timeline:
    """When each program could start, and when it ended; microbatches are counted from the first."""
    first = min((event.microbatch for event in events), default=0)
    ends = _find_ends(events)
    free_at = [0.0] * len(schedule.workers)
    spans = []
    for event in events:
        worker, inputs = event.worker, _inputs_ready(event, ends)
        start = min(max(free_at[worker], inputs, event.dispatched_s), event.done_s)
        free_at[worker] = event.done_s
        number = event.microbatch - first
        spans.append(Span(worker, event.kind, event.stage, number, start, event.done_s))
    return Timeline.of(f"{schedule.name}, measured", len(schedule.workers), spans)


def _find_ends(events: Sequence[Event]) -> Ends:
    ends: Ends = {}
    for event in events:
        for letter in actions_of(event.kind):
            for result in KINDS[letter].makes:
                key = result, event.stage, event.microbatch
                ends[key] = max(ends.get(key, 0.0), event.done_s)
    return ends


def _inputs_ready(event: Event, ends: Ends) -> float:
    """When the results that the first action of a program needs were ready."""
    needs = KINDS[actions_of(event.kind)[0]].needs
    ready = (
        ends.get((need.result, event.stage + need.step, event.microbatch), 0.0) for need in needs
    )
    return max(ready, default=0.0)


def _lasting(kind: ProgramKind, outputs: Any) -> Any:
    """One of the outputs of a program that no later program takes over.

    Gradients and weights are donated to later programs: a value made of them stands for them.
    """
    if kind == "F":
        return outputs
    if kind == "I":  # the cotangents that it sends, or what it holds for the weight part
        leaves = outputs[2].values
        return outputs[1] or (_touch(leaves[0]) if leaves else ())
    if kind in ("FB", "FBU"):
        return outputs[0]
    if kind == "B" and outputs[1]:
        return outputs[1]
    leaves = outputs[0] if kind == "B" else outputs
    return _touch(leaves[0]) if leaves else ()


def _wait_for_each(waiting: queue.SimpleQueue[tuple[Event, Any] | None]) -> None:
    while (item := waiting.get()) is not None:
        event, values = item
        with contextlib.suppress(Exception):  # the loss reports it; here only the time counts
            jax.block_until_ready(values)
        event.done_s = time.perf_counter()


_touch: Callable[[jax.Array], jax.Array] = jax.jit(lambda x: x.ravel()[:1])
