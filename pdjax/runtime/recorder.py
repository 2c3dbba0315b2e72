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
from typing import Any, cast

import jax

from pdjax.distributed import Peers
from pdjax.runtime.replica_map import ReplicaMap
from pdjax.schedules import Action, Schedule
from pdjax.schedules.lower import ProgramKind
from pdjax.schedules.schedule import ActionKind, inputs_of
from pdjax.timeline.timeline import Span, Timeline


@dataclass
class Event:
    """A program that was dispatched; `done_s` is set when its results are ready."""

    kind: ProgramKind
    worker: int
    stage: int
    microbatch: int
    dispatched_s: float
    done_s: float = 0.0


Ends = dict[tuple[str, int, int], float]
"""When programs ended, by kind, stage and microbatch."""


class Recorder:
    """Is told of every dispatch (`observe`), and waits for all that was dispatched (`finish`)."""

    def __init__(self, schedule: Schedule, weights: Iterable[jax.Array]) -> None:
        """Starts the threads.

        Args:
            schedule: the schedule that is run.
            weights: one of the weights of each stage, for which what `observe` needs is compiled.
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

    def observe(self, kind: ProgramKind, replica: int, microbatch: int, made: Any) -> None:
        """Notes that a program was dispatched, and waits for it elsewhere."""
        stage, worker = self._replicas.stage_of[replica], self._replicas.worker_of[replica]
        event = Event(kind, worker, stage, microbatch, time.perf_counter())
        self._events.append(event)
        self._queues[worker].put((event, _lasting(kind, made)))

    def finish(self) -> list[Event]:
        """Waits for everything that was dispatched; returns it in order."""
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
    mine = [time.perf_counter(), [astuple(event) for event in events]]
    said = peers.exchange("what was recorded", mine)
    found = []
    for now, theirs in said:
        for values in theirs:
            event, ahead = Event(*values), now - said[0][0]
            event.dispatched_s, event.done_s = event.dispatched_s - ahead, event.done_s - ahead
            found.append(event)
    return found


def timeline_of(schedule: Schedule, events: Sequence[Event]) -> Timeline:
    """When each program could start, and when it ended; microbatches are counted from the first."""
    first = min((event.microbatch for event in events), default=0)
    ends = {(e.kind, e.stage, e.microbatch): e.done_s for e in events}
    free_at = [0.0] * len(schedule.workers)
    spans = []
    for event in events:
        worker, inputs = event.worker, _inputs_ready(schedule, event, ends)
        start = min(max(free_at[worker], inputs, event.dispatched_s), event.done_s)
        free_at[worker] = event.done_s
        number = event.microbatch - first
        spans.append(Span(worker, event.kind, event.stage, number, start, event.done_s))
    return Timeline.of(f"{schedule.name}, measured", len(schedule.workers), spans)


def _inputs_ready(schedule: Schedule, event: Event, ends: Ends) -> float:
    kind = cast(ActionKind, event.kind[0])
    needs = inputs_of(Action(kind, event.stage, event.microbatch), schedule.num_stages)
    return max((_end_of(need, ends) for need in needs), default=0.0)


def _end_of(action: Action, ends: Ends) -> float:
    kinds = ("B", "I", "FB", "FBU") if action.kind == "B" else (action.kind, "FB", "FBU")
    return max(ends.get((kind, action.stage, action.microbatch), 0.0) for kind in kinds)


def _lasting(kind: ProgramKind, made: Any) -> Any:
    """Of what a program made, something that no later program is given for good.

    Gradients and weights are: a value made of them stands in for them.
    """
    if kind == "F":
        return made
    if kind == "I":  # the cotangents that it sends, or what it holds for the weight part
        leaves = made[2].values
        return made[1] or (_touch(leaves[0]) if leaves else ())
    if kind in ("FB", "FBU"):
        return made[0]
    if kind == "B" and made[1]:
        return made[1]
    leaves = made[0] if kind == "B" else made
    return _touch(leaves[0]) if leaves else ()


def _wait_for_each(waiting: queue.SimpleQueue[tuple[Event, Any] | None]) -> None:
    while (item := waiting.get()) is not None:
        event, values = item
        with contextlib.suppress(Exception):  # the loss reports it; here only the time counts
            jax.block_until_ready(values)
        event.done_s = time.perf_counter()


_touch: Callable[[jax.Array], jax.Array] = jax.jit(lambda x: x.ravel()[:1])
