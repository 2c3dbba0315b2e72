"""Tasks in time: each in its turn, and not before its messages have arrived.

Nothing here imports JAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np


@dataclass(frozen=True, eq=False)
class Tasks:
    """The tasks, lane after lane, and the messages between them.

    A lane does its tasks one after the other, in their order. A message sets out when its task is
    done. It takes its time on a link, which carries one message at a time, in the order in which
    they were handed over; of several at once, that of the lower lane is first.

    Attributes:
        lane: for each task its lane, ascending.
        seconds: for each task how long it takes.
        missing: for each task how many messages it waits for.
        num_lanes: number of lanes.
        source: for each message the task that sends it, ascending.
        target: the task that waits for it.
        link: the link that it takes; -1 if it needs none, and no time.
        travel_s: how long it takes on it.
        shared: for each link whether several lanes send over it.
    """

    lane: np.ndarray
    seconds: np.ndarray
    missing: np.ndarray
    num_lanes: int
    source: np.ndarray
    target: np.ndarray
    link: np.ndarray
    travel_s: np.ndarray
    shared: np.ndarray


@dataclass(frozen=True, eq=False)
class Times:
    """The times of all tasks and messages.

    Attributes:
        start_s: for each task when it starts.
        end_s: for each task when it is done.
        sent_s: for each message when its link is free for it.
        arrived_s: for each message when it is there.
        stuck: the first task of each lane that never can start.
    """

    start_s: np.ndarray
    end_s: np.ndarray
    sent_s: np.ndarray
    arrived_s: np.ndarray
    stuck: tuple[int, ...]


def run(tasks: Tasks) -> Times:
    """When every task starts, each as early as it can."""
    running = _Progress(tasks)
    stuck = running.finish()
    start_s = np.array(running.ready_s)
    end_s = start_s + tasks.seconds
    on_link = tasks.link >= 0
    sent_s = np.where(on_link, running.sent_s, end_s[tasks.source])
    return Times(start_s, end_s, sent_s, sent_s + tasks.travel_s, stuck)


class _Progress:
    """The progress of each lane and each link.

    Lists of Python's numbers, as single entries are read and written all the time.
    """

    def __init__(self, tasks: Tasks) -> None:
        lanes, counts = np.arange(tasks.num_lanes + 1), np.arange(len(tasks.lane) + 1)
        bounds = np.searchsorted(tasks.lane, lanes).tolist()
        self.at, self.stops = bounds[:-1], bounds[1:]  # of each lane, its next task and its end
        self.lane = tasks.lane.tolist()
        self.seconds = tasks.seconds.tolist()
        self.missing = tasks.missing.tolist()
        self.first = np.searchsorted(tasks.source, counts).tolist()  # of each task, its messages
        self.target = tasks.target.tolist()
        self.link = tasks.link.tolist()
        self.travel_s = tasks.travel_s.tolist()
        self.shared = tasks.shared.tolist()
        self.free_s = [0.0] * tasks.num_lanes
        self.ready_s = [0.0] * len(self.lane)  # when the last message was there; then the start
        self.sent_s = [0.0] * len(self.target)
        self.link_free_s = [0.0] * len(self.shared)
        self.requests: list[tuple[float, int]] = []  # for shared links: time and message

    def finish(self) -> tuple[int, ...]:
        """Runs everything; returns the next task of each lane that never can start."""
        ahead = enumerate(zip(self.at, self.stops, strict=True))
        missing = self.missing
        self.advance([lane for lane, (at, stop) in ahead if at < stop and not missing[at]])
        # Now every lane waits for a message, so no later request can come before the first here.
        while self.requests:
            asked_s, message = heappop(self.requests)
            self.advance(self.deliver(message, self.transmit(message, asked_s)))
        return tuple(at for at, stop in zip(self.at, self.stops, strict=True) if at < stop)

    def advance(self, waiting: list[int]) -> None:
        """Runs the tasks that lanes can start, and those of other lanes that become ready."""
        stops, ready_s, missing, first = self.stops, self.ready_s, self.missing, self.first
        while waiting:
            lane = waiting.pop()
            at, stop, free_s = self.at[lane], stops[lane], self.free_s[lane]
            while at < stop and not missing[at]:
                start_s = ready_s[at]
                if start_s < free_s:
                    start_s = ready_s[at] = free_s
                free_s = start_s + self.seconds[at]
                for message in range(first[at], first[at + 1]):
                    waiting += self.send(message, free_s)
                at += 1
            self.at[lane], self.free_s[lane] = at, free_s

    def send(self, message: int, done_s: float) -> list[int]:
        """Sends a message whose task is done; returns the lanes that it wakes."""
        link = self.link[message]
        if link < 0:
            return self.deliver(message, done_s)
        if self.shared[link]:
            heappush(self.requests, (done_s, message))
            return []
        return self.deliver(message, self.transmit(message, done_s))

    def transmit(self, message: int, asked_s: float) -> float:
        """Puts a message on its link; returns when it is there."""
        link = self.link[message]
        sent_s = self.sent_s[message] = max(asked_s, self.link_free_s[link])
        self.link_free_s[link] = sent_s + self.travel_s[message]
        return self.link_free_s[link]

    def deliver(self, message: int, there_s: float) -> list[int]:
        """Notes that a message is there; returns the lane of its target if that can start now."""
        target = self.target[message]
        if there_s > self.ready_s[target]:
            self.ready_s[target] = there_s
        self.missing[target] -= 1
        if self.missing[target]:
            return []
        lane = self.lane[target]
        return [lane] if self.at[lane] == target else []
