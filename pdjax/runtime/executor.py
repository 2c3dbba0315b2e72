"""Runs the instructions of a schedule.

The executor is a loop over a list that was made once (`pdjax.runtime.instructions`), and has a
method for each instruction. It dispatches one compiled program after the other and returns; JAX
runs the devices concurrently. Nothing in it depends on which schedule, split or placement the list
was made of. The methods are here and in `passes` and `updates`.

Microbatches that were never handed over, or were finished by a drain, have their blocks left out:
so a pipeline fills and drains. Training and evaluation run in the same loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pdjax.communication.transport import Transport
from pdjax.runtime.instructions import Block, Collect, Send
from pdjax.runtime.passes import PassRunner
from pdjax.runtime.routing import put
from pdjax.runtime.state import Feed, Run, Step
from pdjax.runtime.updates import Updates
from pdjax.schedules import Schedule
from pdjax.schedules.dispatch import reach
from pdjax.schedules.lower import ProgramKind
from pdjax.schedules.weight_rule import WeightRule
from pdjax.trace.jit import Values

Observer = Callable[[ProgramKind, int, int, Any], None]
"""Is told of every program dispatched: kind, replica, microbatch, and the arrays it makes."""


class Executor:
    """Dispatches the steps of a schedule.

    Args:
        schedule: the schedule that the instructions were made of.
        rule: which weights the passes read.
        transport: how values travel.
        counts: for each replica what the sum of so many gradients is divided by, as arrays there.
        average_state: averages the new values of a stage's mutable state over the microbatches of
            a minibatch.
    """

    def __init__(
        self,
        schedule: Schedule,
        rule: WeightRule,
        transport: Transport,
        counts: Sequence[dict[int, Any]] = (),
        average_state: Callable[[Sequence[Values]], Values] | None = None,
    ) -> None:
        self.schedule = schedule
        self.observer: Observer | None = None
        self.transport = transport
        self._reach = reach(schedule) * schedule.num_microbatches
        size = schedule.num_microbatches
        updates = Updates(transport, rule.backward == "stashed", size, counts, average_state)
        passes = PassRunner(size, updates)
        # On a CPU XLA runs what one thread dispatches in order: what waits for another process
        # would hold up the passes behind it.
        is_alone = all(transport.is_local)
        self._waiting = None if is_alone else ThreadPoolExecutor(1, "pdjax-all-reduce")
        self._handlers: dict[str, Callable[[Any, Step, int], None]] = {
            "SEND": self._send,
            "COLLECT": self._collect,
            **passes.handlers,
            **updates.handlers,
        }

    def step(self, run: Run, feed: Feed) -> tuple[Any, Values]:
        """Dispatches one step; returns its loss and its metrics, leaf by leaf."""
        first = run.num_microbatches_seen
        run.num_microbatches_seen += self.schedule.num_microbatches
        run.passes = run.passes_of[first] = feed.passes
        step = self._walk(run, feed, first)
        assert step.results is not None, "every step collects them"
        loss, _, metrics = step.results
        for known in (run.divisors, run.passes_of):
            for old in [k for k in known if k < first - self._reach]:
                del known[old]
        return loss, metrics

    def drain(self, run: Run) -> None:
        """Dispatches what is still to be done for the microbatches that were handed over."""
        seen = run.num_microbatches_seen
        for first in range(seen, seen + self._reach, self.schedule.num_microbatches):
            if seen > run.start:
                self._walk(run, None, first)
        run.start = seen
        for state in run.stages:
            state.in_flight.restart(state.lasting.version)
        run.divisors.clear()
        run.passes_of.clear()

    def _walk(self, run: Run, feed: Feed | None, first: int) -> Step:
        """Runs the blocks of a step whose microbatches were handed over and are not finished."""
        assert run.passes is not None, "nothing was handed over yet"
        start, seen, phases = run.start, run.num_microbatches_seen, run.passes.listing.phases
        minibatch = (first - start) // self.schedule.num_microbatches
        cycle, phase = divmod(minibatch, len(phases))
        step = Step(run, feed, first, cycle)
        step.done = None if self.observer is None else []
        mixed = any(passes is not run.passes for passes in run.passes_of.values())
        handlers = self._handlers
        for number, block in enumerate(phases[phase]):
            microbatch = first + block.microbatch
            if microbatch >= seen > microbatch - block.num_microbatches + 1:
                microbatch = seen - 1  # of a round that was broken off
            if not start <= microbatch < seen:
                continue
            if mixed:
                block = self._block_for(run, block, phase, number, microbatch)
            if block.waits and self._waiting is not None:  # for the dispatch only
                self._waiting.submit(self._do, block, step, microbatch).result()
            else:
                for instruction in block.instructions:
                    handlers[instruction.op](instruction, step, microbatch)
            if step.done:
                self._tell(step)
        return step

    def _do(self, block: Block, step: Step, microbatch: int) -> None:
        for instruction in block.instructions:
            self._handlers[instruction.op](instruction, step, microbatch)

    def _tell(self, step: Step) -> None:
        done, step.done = step.done, []
        for each in done or ():
            assert self.observer is not None, "it was there when the step began"
            self.observer(*each)

    def _block_for(self, run: Run, block: Block, phase: int, number: int, microbatch: int) -> Block:
        """The same block with the programs for the batch shape of its microbatch."""
        size = self.schedule.num_microbatches
        passes = run.passes_of[microbatch // size * size]
        return passes.listing.phases[phase][number]

    # -------- what passes make

    def _send(self, op: Send, step: Step, microbatch: int) -> None:
        values = None
        if op.sends:
            values = op.pick(step.returns if op.content == "cotangents" else step.outputs)
            if op.content != "results":
                step.run.sent_bytes[op.source, op.target] += op.num_bytes
        moved = self.transport.send_recv(values, op.shapes, op.source, op.target)
        if moved is None:
            return
        inbox = step.made
        if op.content != "results":
            in_flight = step.run.stages[op.target].in_flight
            is_ahead = op.content == "activations"
            inbox = in_flight.activations if is_ahead else in_flight.cotangents
        put(inbox, microbatch, op.slots, op.num_slots, tuple(moved))

    def _collect(self, op: Collect, step: Step, microbatch: int) -> None:
        """The results of the minibatch, from those of its microbatches."""
        del op, microbatch
        assert step.feed is not None, "not while draining"
        results, combined = step.feed.passes.results, None
        collector = len(self.transport.is_local) - 1
        if self.transport.is_local[collector]:
            combined = results.of_minibatch([step.made[at] for at in sorted(step.made)])
        found = self.transport.broadcast(combined, results.shapes, collector)
        if results.weighted:
            step.run.divisors[step.first] = found[1]
            step.results = found[0], found[1], tuple(found[2:])
        else:
            step.results = found[0], None, tuple(found[1:])
