"""A simulator to check the other one by: a clock that goes from event to event.

It is written from what `simulate` promises, looks at everything at every event, and is slow.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pdjax.schedules import Action, Schedule
from pdjax.schedules.weight_rule import WeightRule
from pdjax.simulate import StageCost


def chain(num_stages: int, size: float = 1, **fields) -> list[StageCost]:
    """Equal stages that send `size` bytes each way."""
    cost = StageCost(forward_s=1, backward_s=2, **fields)
    return [
        replace(
            cost,
            sends=((stage + 1, size),) if stage + 1 < num_stages else (),
            returns=((stage - 1, size),) if stage else (),
        )
        for stage in range(num_stages)
    ]


class Slow:
    """Runs a schedule; afterwards `spans` and `transfers` have what happened."""

    def __init__(self, schedule: Schedule, costs, topology, num_minibatches, workers):
        self.schedule, self.costs, self.topology, self.places = schedule, costs, topology, workers
        self.lists = schedule.unroll(num_minibatches)
        self.where = {
            (action.stage, action.microbatch): worker
            for worker, actions in enumerate(self.lists)
            for action in actions
            if action.kind == "F"
        }
        self.done = [0] * len(self.lists)  # actions of each worker that are done
        self.busy = [False] * len(self.lists)
        self.there: set[Any] = set()  # what has arrived
        self.waiting: list[Any] = []  # for links: time, worker, number, link, transfer
        self.link_busy: set[Any] = set()
        self.events: list[Any] = []
        self.numbers = itertools.count()
        self.spans: dict[tuple[int, Action], tuple[float, float]] = {}
        self.transfers: list[Any] = []
        self.reducing: set[int] = set()
        self.now = 0.0
        self.start_all()
        while self.events:
            self.now = self.events[0][0]
            while self.events and self.events[0][0] == self.now:
                heapq.heappop(self.events)[2]()
                self.start_all()
            self.start_links()

    def later(self, seconds, what):
        heapq.heappush(self.events, (self.now + seconds, next(self.numbers), what))

    def start_all(self):
        for worker, actions in enumerate(self.lists):
            if not self.busy[worker] and self.done[worker] < len(actions):
                action = actions[self.done[worker]]
                if self.needs(action) <= self.there:
                    self.start(worker, action)
        for stage, holders in enumerate(self.schedule.holders):
            if len(holders) > 1:
                self.reduce(stage, holders)

    def needs(self, action):
        kind, stage, microbatch = action
        if kind == "U":
            alone = len(self.schedule.holders[stage]) == 1
            return set() if alone else {("R", stage, microbatch)}
        if kind == "W":
            return set()
        group = "F" if kind == "F" else "B"
        own = () if kind == "F" else {("own", stage, microbatch)}
        beside = {stage - 1} if kind == "F" else {stage + 1}
        senders = {s for s, cost in enumerate(self.costs) if stage in dict(self.sends(cost, group))}
        there = range(len(self.costs))
        return {(group, s, stage, microbatch) for s in (senders | beside) & set(there)} | set(own)

    def sends(self, cost, group):
        return cost.sends if group == "F" else cost.returns

    def start(self, worker, action):
        cost = self.costs[action.stage]
        seconds = {
            "F": cost.forward_s,
            "B": cost.backward_s,
            "I": cost.input_part_s,
            "W": cost.weight_part_s,
            "U": cost.update_s,
        }[action.kind]
        self.busy[worker] = True
        self.spans[worker, action] = (self.now, self.now + seconds)
        self.later(seconds, lambda: self.finish(worker, action))

    def finish(self, worker, action):
        kind, stage, microbatch = action
        self.busy[worker] = False
        self.done[worker] += 1
        if kind == "F":
            self.there.add(("own", stage, microbatch))
        if kind in "FBI":
            group = "F" if kind == "F" else "B"
            pairs = self.sends(self.costs[stage], group)
            beside = stage + 1 if kind == "F" else stage - 1
            if beside not in dict(pairs):
                self.there.add((group, stage, beside, microbatch))
            for target, size in pairs:
                self.send(worker, (group, stage, target, microbatch), size)

    def send(self, worker, token, size):
        group, stage, target, microbatch = token
        other = self.where[target, microbatch]
        if other == worker or not size:
            self.there.add(token)
            return
        sent = (worker, other, group, stage, microbatch, size)
        if self.topology is None:
            self.there.add(token)
            self.transfers.append((*sent, self.now, self.now))
            return
        link, speed = self.link(worker, other)
        request = (self.now, worker, next(self.numbers), link, size / speed, token, sent)
        self.waiting.append(request)

    def link(self, worker, other):
        a, b, size = self.places[worker], self.places[other], 1
        for level in self.topology.levels:
            wider = size * level.num_units
            if a // wider == b // wider:
                return (size, a // size), level.bandwidth_bytes_per_s
            size = wider
        raise AssertionError

    def start_links(self):
        for request in sorted(self.waiting, key=lambda request: request[:3]):
            *_, link, seconds, token, sent = request
            if link not in self.link_busy:
                self.link_busy.add(link)
                self.waiting.remove(request)
                self.transfers.append((*sent, self.now, self.now + seconds))
                self.later(seconds, lambda link=link, token=token: self.arrive(link, token))

    def arrive(self, link, token):
        self.link_busy.remove(link)
        self.there.add(token)

    def reduce(self, stage, holders):
        """Starts the next all-reduce of a stage if all gradients of its round are there."""
        rounds = sorted({a.microbatch for w in holders for a in self.lists[w] if a.kind == "U"})
        open_ = [b for b in rounds if ("R", stage, b) not in self.there]
        if stage in self.reducing or not open_:
            return
        for worker in holders:
            actions = self.lists[worker]
            gradients = [
                n
                for n, (kind, of, microbatch) in enumerate(actions)
                if of == stage and kind in "BW" and microbatch <= open_[0]
            ]
            if gradients and self.done[worker] <= gradients[-1]:
                return
        r, size = len(holders), self.costs[stage].gradient_bytes
        size = 2 * (r - 1) / r * size
        pairs = [(holders[k], holders[(k + 1) % r]) for k in range(r)]
        speed = min(self.link(a, b)[1] for a, b in pairs) if self.topology else float("inf")
        self.reducing.add(stage)
        if size:
            times = self.now, self.now + size / speed
            self.transfers += [(a, b, "R", stage, open_[0], round(size), *times) for a, b in pairs]
        self.later(size / speed, lambda: self.reduced(stage, open_[0]))

    def reduced(self, stage, microbatch):
        self.reducing.remove(stage)
        self.there.add(("R", stage, microbatch))


def versions_alive(
    worker: Sequence[Action],
    stage: int,
    rule: WeightRule,
    num_microbatches: int = 1,
    delay: int | None = None,
) -> list[int]:
    """After each action of a worker, how many versions of the weights of `stage` are alive.

    These are the newest, those that a stash holds and those that a forward pass is yet to read.
    """
    mine = [action for action in worker if action.stage == stage and action.kind == "F"]
    coming = [max(0, a.microbatch // num_microbatches - (delay or 0)) for a in mine]
    newest = num_forward = 0
    stashed: dict[int, int] = {}
    counts = []
    for action in worker:
        if action.stage == stage:
            if action.kind == "U":
                newest += 1
            elif action.kind == "F":
                stashed[action.microbatch] = newest if delay is None else coming[num_forward]
                num_forward += 1
            elif action.kind in ("B", "W"):
                stashed.pop(action.microbatch, None)
        kept = set(stashed.values()) if rule.backward == "stashed" else set()
        if delay is not None and num_forward < len(coming):
            kept |= set(range(coming[num_forward], newest))
        counts.append(len(kept | {newest}))
    return counts
