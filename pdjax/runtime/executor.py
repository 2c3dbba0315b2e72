"""Runs the instructions of a schedule.

The executor is a loop over a list that was made once (`pdjax.runtime.instructions`), and has a
method for each instruction. It dispatches one compiled program after the other and returns; JAX
runs the devices concurrently. Nothing in it depends on which schedule, split or placement the list
was made of:

    F   reads the weights, puts into the stash what the backward pass needs
    B   takes it out of the stash, adds to the stage's gradients
    I   takes it out of the stash, holds what W needs
    W   adds to the stage's gradients

Microbatches that were never handed over, or were finished by a drain, have their blocks left out:
so a pipeline fills and drains. Training and evaluation run in the same loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pdjax.communication.transport import Transport
from pdjax.runtime.inputs import Given, Reads
from pdjax.runtime.instructions import Block, Collect, RunPass, Send
from pdjax.runtime.routing import put
from pdjax.runtime.stage_input_weight import Held
from pdjax.runtime.state import Feed, Kept, Run, StageState, Step
from pdjax.runtime.updates import Updates
from pdjax.schedules import Schedule
from pdjax.schedules.lower import ProgramKind
from pdjax.schedules.phases import reach
from pdjax.schedules.versions import delay_of
from pdjax.schedules.weight_rule import WeightRule
from pdjax.trace.jit import Values

Observer = Callable[[ProgramKind, int, int, Any], None]
"""Is told of every program dispatched: kind, replica, microbatch, and the arrays it makes."""

_NOTHING_READ = Reads(False, False, False, False)
_NOTHING = Given()


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
        self.stashes = rule.backward == "stashed"
        self._delay = delay_of(rule, schedule)
        self._updates = updates = Updates(self, schedule, self._delay, counts, average_state)
        # On a CPU XLA runs what one thread dispatches in order: what waits for another process
        # would hold up the passes behind it.
        is_alone = all(transport.is_local)
        self._waiting = None if is_alone else ThreadPoolExecutor(1, "pdjax-all-reduce")
        self._handlers: dict[str, Callable[[Any, Step, int], None]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._input_part,
            "W": self._weight_part,
            "FB": self._fused,
            "FBU": self._whole,
            "SEND": self._send,
            "COLLECT": self._collect,
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
            if self.observer is not None:
                self._tell(step, self.observer)
        return step

    def _do(self, block: Block, step: Step, microbatch: int) -> None:
        for instruction in block.instructions:
            self._handlers[instruction.op](instruction, step, microbatch)

    def _tell(self, step: Step, observer: Observer) -> None:
        done, step.done = step.done, []
        for kind, replica, microbatch, made in done:
            observer(kind, replica, microbatch, made)

    def _block_for(
        self, run: Run, block: Block, phase: int, number: int, microbatch: int
    ) -> Block:
        """The same block with the programs for the batch shape of its microbatch."""
        size = self.schedule.num_microbatches
        passes = run.passes_of[microbatch // size * size]
        return passes.listing.phases[phase][number]

    # -------- passes

    def _forward(self, op: RunPass, step: Step, microbatch: int) -> None:
        state = step.run.stages[op.replica]
        given = self._given(op, op.reads, step, microbatch)
        version, weights = self._weights(state, step.run, microbatch)
        outputs = op.program(weights, given, self._received(op, state, microbatch))
        step.outputs = outputs
        if op.keeps:
            in_flight, counters = state.in_flight, state.counters
            if op.kept_reads is not None:
                given = self._given(op, op.kept_reads, step, microbatch)
            pinned = weights if self.stashes else None
            in_flight.stash[microbatch] = Kept(version, pinned, given, op.pick_saved(outputs))
            if len(in_flight.stash) > counters.peak_in_flight:
                counters.peak_in_flight = len(in_flight.stash)
        if op.pick_state is not None:
            self._keep_state(op, state, outputs)
        self._finish(op, step, state, microbatch, outputs)

    def _backward(self, op: RunPass, step: Step, microbatch: int) -> None:
        state = step.run.stages[op.replica]
        in_flight = state.in_flight
        _, weights, given, saved = in_flight.stash.pop(microbatch)
        gradients, update = in_flight.gradients, step.cycle * op.updates_per_cycle + op.update
        made = op.program(
            state.lasting.weights if weights is None else weights,
            given,
            saved,
            op.group(in_flight.cotangents.pop(microbatch, ())),
            gradients.pop(update, None),
        )
        gradients[update], step.returns = made
        self._finish(op, step, state, microbatch, made)

    def _input_part(self, op: RunPass, step: Step, microbatch: int) -> None:
        state = step.run.stages[op.replica]
        in_flight = state.in_flight
        version, weights, given, saved = in_flight.stash.pop(microbatch)
        gradients, update = in_flight.gradients, step.cycle * op.updates_per_cycle + op.update
        made = op.program(
            state.lasting.weights if weights is None else weights,
            given,
            saved,
            op.group(in_flight.cotangents.pop(microbatch, ())),
            gradients.pop(update, None),
        )
        gradients[update], step.returns, held = made
        in_flight.pending[microbatch] = Kept(version, weights, *held)
        self._finish(op, step, state, microbatch, made)

    def _weight_part(self, op: RunPass, step: Step, microbatch: int) -> None:
        state = step.run.stages[op.replica]
        _, weights, given, values = state.in_flight.pending.pop(microbatch)
        gradients = state.in_flight.gradients
        update = step.cycle * op.updates_per_cycle + op.update
        gradients[update] = sums = op.program(
            state.lasting.weights if weights is None else weights,
            Held(given, values),
            gradients.pop(update, None),
        )
        self._finish(op, step, state, microbatch, sums)

    def _fused(self, op: RunPass, step: Step, microbatch: int) -> None:
        state = step.run.stages[op.replica]
        gradients = state.in_flight.gradients
        given = self._given(op, op.reads, step, microbatch)
        _, weights = self._weights(state, step.run, microbatch)
        update = step.cycle * op.updates_per_cycle + op.update
        received = self._received(op, state, microbatch)
        made = op.program(weights, given, received, gradients.pop(update, None))
        step.outputs, gradients[update], step.returns = made
        self._finish_whole(op, step, state, microbatch, made)

    def _whole(self, op: RunPass, step: Step, microbatch: int) -> None:
        state = step.run.stages[op.replica]
        lasting, given = state.lasting, self._given(op, op.reads, step, microbatch)
        received = self._received(op, state, microbatch)
        made = op.program(lasting.weights, given, received, lasting.optimizer)
        step.outputs, lasting.weights, lasting.optimizer, step.returns = made
        lasting.version += 1
        self._finish_whole(op, step, state, microbatch, made)
        if op.averages:
            self._updates.average_now(state, op.updates)

    def _finish_whole(
        self, op: RunPass, step: Step, state: StageState, microbatch: int, made: Any
    ) -> None:
        state.counters.peak_in_flight = max(state.counters.peak_in_flight, 1)
        if op.pick_state is not None:
            self._keep_state(op, state, step.outputs)
        self._finish(op, step, state, microbatch, made)

    def _finish(
        self, op: RunPass, step: Step, state: StageState, microbatch: int, made: Any
    ) -> None:
        """Counts a program."""
        state.counters.performed[op.kind] += 1
        if op.stash_bytes:
            state.counters.add_stash(op.stash_bytes)
            tally = step.run.workers[step.run.worker_of[op.replica]]
            if op.frees:  # the FREE that follows counts both
                tally.stash_bytes += op.stash_bytes
            else:
                tally.add(0, op.stash_bytes)
        if self.observer is not None:
            step.done.append((op.kind, op.replica, microbatch, made))

    # -------- what passes read

    def _weights(self, state: StageState, run: Run, microbatch: int) -> tuple[int, Values]:
        """The version that a forward pass reads, and its weights."""
        lasting, in_flight = state.lasting, state.in_flight
        if self._delay is None:
            return lasting.version, lasting.weights
        version, following = (
            in_flight.version_at_drain
            + max(0, (number - run.start) // self.schedule.num_microbatches - self._delay)
            for number in (microbatch, microbatch + 1)
        )
        in_flight.oldest_read = following  # there are no replicas
        if version == lasting.version:
            return version, lasting.weights
        return version, in_flight.old_versions[version]

    def _given(self, op: RunPass, reads: Reads, step: Step, microbatch: int) -> Given:
        if reads == _NOTHING_READ:
            return _NOTHING
        feed, model = step.feed, step.run.stages[op.replica].lasting.model
        assert feed is not None, "a forward pass outside a step"
        return Given(
            op.consts if reads.consts else (),
            tuple(model[i] for i in op.state) if reads.state else (),
            feed.batch[op.replica][op.microbatch] if reads.batch else (),
            (feed.keys[op.replica],) if reads.key else (),
            (np.uint32(microbatch),) if reads.key else (),
        )

    def _received(self, op: RunPass, state: StageState, microbatch: int) -> Values:
        if not op.num_activations:
            return ()
        return tuple(state.in_flight.activations.pop(microbatch))

    def _keep_state(self, op: RunPass, state: StageState, outputs: Values) -> None:
        assert op.pick_state is not None, "there is new state"
        new = op.pick_state(outputs)
        if op.averages:
            state.in_flight.new_model.append(new)
        else:
            state.lasting.model.update(zip(op.updates, new, strict=True))

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
