"""How the executor runs the passes of stages: F, B, I, W, FB and FBU.

F   reads the weights, puts into the stash what the backward pass needs
B   takes it out of the stash, adds to the stage's gradients
I   takes it out of the stash, holds what W needs
W   adds to the stage's gradients
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pdjax.runtime.inputs import Given, Reads
from pdjax.runtime.instructions import RunPass
from pdjax.runtime.stage_input_weight import Held
from pdjax.runtime.state import Kept, Run, StageState, Step
from pdjax.runtime.updates import Updates
from pdjax.trace.jit import Values

_NOTHING = Given()


class PassRunner:
    """The instructions of an executor that run passes.

    Args:
        num_microbatches: microbatches in a minibatch.
        updates: averages the mutable state.
    """

    def __init__(self, num_microbatches: int, updates: Updates) -> None:
        self._num_microbatches = num_microbatches
        self._updates = updates
        self.handlers: dict[str, Callable[[Any, Step, int], None]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._input_part,
            "W": self._weight_part,
            "FB": self._fused,
            "FBU": self._whole,
        }

    def _forward(self, op: RunPass, step: Step, microbatch: int) -> None:
        state = step.run.stages[op.replica]
        given = self._given(op, op.reads, step, microbatch)
        version, weights = self._weights(op, state, step.run, microbatch)
        outputs = op.program(weights, given, self._received(op, state, microbatch))
        step.outputs = outputs
        if op.keeps:
            in_flight, counters = state.in_flight, state.counters
            if op.kept_reads is not op.reads:
                given = self._given(op, op.kept_reads, step, microbatch)
            pinned = weights if op.pins else None
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
        _, weights = self._weights(op, state, step.run, microbatch)
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
        if step.done is not None:
            step.done.append((op.kind, op.replica, microbatch, made))

    def _weights(
        self, op: RunPass, state: StageState, run: Run, microbatch: int
    ) -> tuple[int, Values]:
        """The version that a forward pass reads, and its weights."""
        lasting, in_flight = state.lasting, state.in_flight
        if op.delay is None:
            return lasting.version, lasting.weights
        version, following = (
            in_flight.version_at_drain
            + max(0, (number - run.start) // self._num_microbatches - op.delay)
            for number in (microbatch, microbatch + 1)
        )
        in_flight.oldest_read = following  # there are no replicas
        if version == lasting.version:
            return version, lasting.weights
        return version, in_flight.old_versions[version]

    def _given(self, op: RunPass, reads: Reads | None, step: Step, microbatch: int) -> Given:
        if reads is None:
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
