"""How the executor makes updates: AVERAGE, SPLIT, REDUCE, PREPARE, UPDATE and FREE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from pdjax.communication.transport import Transport
from pdjax.runtime.instructions import (
    Average,
    Free,
    PrepareUpdate,
    ReduceGradients,
    Split,
    UpdateWeights,
)
from pdjax.runtime.state import StageState, Step
from pdjax.trace.jit import Values, total


class Updates:
    """The instructions of an executor that are about weights.

    Args:
        transport: moves values between replicas.
        stashes: whether old versions of the weights are kept for backward passes.
        num_microbatches: microbatches in a minibatch.
        counts: for each replica what the sum of so many gradients is divided by, as arrays there.
        average_state: averages the new values of a stage's mutable state over the microbatches of
            a minibatch.
    """

    def __init__(
        self,
        transport: Transport,
        stashes: bool,
        num_microbatches: int,
        counts: Sequence[dict[int, Any]],
        average_state: Callable[[Sequence[Values]], Values] | None,
    ) -> None:
        self._transport, self._stashes = transport, stashes
        self._num_microbatches = num_microbatches
        self._counts = counts
        self._average_state = average_state
        self.handlers: dict[str, Callable[[Any, Step, int], None]] = {
            "AVERAGE": self._average,
            "SPLIT": self._split,
            "REDUCE": self._reduce,
            "PREPARE": self._prepare,
            "UPDATE": self._update,
            "FREE": self._free,
        }

    def average_now(self, state: StageState, leaves: Sequence[int]) -> None:
        """Makes the mutable state of the minibatch out of those of its microbatches."""
        new = state.in_flight.new_model
        if new and self._average_state is not None:
            state.lasting.model.update(zip(leaves, self._average_state(new), strict=True))
            state.in_flight.new_model = []

    def _average(self, op: Average, step: Step, microbatch: int) -> None:
        del microbatch
        self.average_now(step.run.stages[op.replica], op.updates)

    def _split(self, op: Split, step: Step, microbatch: int) -> None:
        del microbatch
        gradients = step.run.stages[op.replica].in_flight.gradients
        update = step.cycle * op.updates_per_cycle + op.update
        gradients[update] = op.ring.begin(op.number, gradients[update])

    def _reduce(self, op: ReduceGradients, step: Step, microbatch: int) -> None:
        del microbatch
        run, replicas = step.run, op.replicas
        update = step.cycle * op.updates_per_cycle + op.update
        states = [run.stages[replica] for replica in replicas]
        for number, replica in enumerate(replicas):
            if op.local[number]:
                following = replicas[(number + 1) % len(replicas)]  # around a ring
                run.sent_bytes[replica, following] += op.reduce.sent_bytes
        sums = op.reduce([state.in_flight.gradients.get(update) for state in states])
        for state, summed, local in zip(states, sums, op.local, strict=True):
            if local:
                state.in_flight.gradients[update] = summed
        if op.mean is not None:
            op.mean([state.lasting.model for state in states])

    def _prepare(self, op: PrepareUpdate, step: Step, microbatch: int) -> None:
        """Runs a phase of an update, and hands what it makes to the replicas that need it."""
        shapes, tree = jax.tree.flatten(op.runner.pack_shapes[op.phase])
        sent = None
        if op.local:
            state = step.run.stages[op.replica]
            update = step.cycle * op.updates_per_cycle + op.update
            made = op.runner.phases[op.phase](
                state.lasting.weights,
                state.lasting.optimizer,
                state.in_flight.gradients[update],
                self._packs(state, op.phase),
                self._divisor(op, step, microbatch),
            )
            sent = jax.tree.leaves(made)
        for target in op.targets:
            moved = self._transport.send_recv(sent, shapes, op.replica, target)
            if moved is not None:
                packs = step.run.stages[target].in_flight.packs.setdefault(op.phase, {})
                packs[op.stage] = jax.tree.unflatten(tree, moved)

    def _packs(self, state: StageState, num_phases: int) -> tuple[dict[int, Any], ...]:
        """What came from other stages after each of the first phases."""
        return tuple(state.in_flight.packs.get(phase, {}) for phase in range(num_phases))

    def _update(self, op: UpdateWeights, step: Step, microbatch: int) -> None:
        state = step.run.stages[op.replica]
        lasting, in_flight = state.lasting, state.in_flight
        update = step.cycle * op.updates_per_cycle + op.update
        if op.keeps:
            in_flight.old_versions[lasting.version] = lasting.weights
        lasting.weights, lasting.optimizer = op.runner.phases[-1](
            lasting.weights,
            lasting.optimizer,
            in_flight.gradients.pop(update, None),
            self._packs(state, op.runner.num_phases - 1),
            self._divisor(op, step, microbatch),
        )
        in_flight.packs.clear()
        lasting.version += 1
        state.counters.performed["U"] += 1
        if step.done is not None:
            step.done.append(("U", op.replica, microbatch, lasting.weights))

    def _divisor(self, op: UpdateWeights | PrepareUpdate, step: Step, microbatch: int) -> Any:
        """The divisor of the gradients that are applied together.

        That is the number of their microbatches, or the weight of their minibatches.
        """
        run, size = step.run, self._num_microbatches
        first = microbatch - (microbatch - run.start) % op.size
        if run.passes is None or not run.passes.results.weighted:
            return self._counts[op.replica][microbatch + 1 - first]
        return total([run.divisors[at] for at in range(first // size * size, microbatch + 1, size)])

    def _free(self, op: Free, step: Step, microbatch: int) -> None:
        """Lets go of versions, and counts those that are left."""
        del microbatch
        run, state = step.run, step.run.stages[op.replica]
        state.in_flight.retire()
        if self._stashes:
            number = len(state.in_flight.versions(state.lasting.version))
            run.workers[run.worker_of[op.replica]].add(state.counters.set_versions(number), 0)
