"""Runs a schedule.

The executor walks the actions of one step in an order that respects what they need
(`pdjax.schedules.dispatch_order`) and dispatches one compiled program for each; JAX runs the
devices concurrently. It is the interpreter of the very schedule that was validated, and nothing in
it depends on which one that is:

    F   reads the weights, puts what the backward pass needs into the stash, sends
    B   takes it out of the stash, adds to the stage's gradients, sends cotangents back
    I   takes it out of the stash, sends cotangents back, holds what W needs
    W   adds to the stage's gradients
    U   applies the gradients

A forward and a backward pass that follow each other on a stage that waits for no cotangent in
between are one program, and so is the update if it follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pdjax.runtime.inputs import Given, Reads
from pdjax.runtime.passes import InstructionKind, Passes
from pdjax.runtime.placed import Values
from pdjax.runtime.stage import OutputIndex
from pdjax.runtime.state import Feed, Halfway, Run, StageState, Stashed, Step
from pdjax.runtime.transport import Transport
from pdjax.runtime.update import Pack, UpdateRunner
from pdjax.schedules import Schedule
from pdjax.schedules.versions import delay_of
from pdjax.weights import WeightRule

Observer = Callable[[InstructionKind, int, int, Any], None]
"""Is told of every program dispatched: what, stage, microbatch, and the arrays it makes."""


class Executor:
    """Dispatches the steps of a schedule.

    Args:
        schedule: what to do in a step.
        rule: which weights the passes read.
        updates: the update of each stage.
        counts: for each stage the number of microbatches in a minibatch, as an array in place.
        transport: how values travel.
        average_state: averages the new values of a stage's mutable state over the microbatches of
            a minibatch; None to update it with every microbatch.
    """

    def __init__(
        self,
        schedule: Schedule,
        rule: WeightRule,
        updates: Sequence[UpdateRunner],
        counts: Sequence[Any],
        transport: Transport,
        average_state: Callable[[Sequence[Values]], Values] | None = None,
    ) -> None:
        self.schedule = schedule
        self.observer: Observer | None = None
        self._reach = schedule.lag * schedule.num_microbatches
        self._stashes = rule.backward == "stashed"
        self._delay = delay_of(rule, schedule)
        self._worker_of = [schedule.worker_of(stage) for stage in range(schedule.num_stages)]
        self._updates = updates
        self._counts = counts
        self._transport = transport
        self._average_state = average_state
        self._handlers: dict[InstructionKind, Callable[[Step, int, int], Any]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._input_part,
            "W": self._weight_part,
            "FB": self._fused,
            "U": self._update,
            "FBU": self._whole,
        }

    def step(self, run: Run, feed: Feed) -> tuple[Any, Values]:
        """Dispatches one step; returns its loss and its metrics, leaf by leaf."""
        first = run.fed
        run.fed += self.schedule.num_microbatches
        step = Step(run, feed, first)
        run.passes = feed.passes
        self._walk(step)
        if step.results is None:
            step.results = self._collect(step)
        loss, _, metrics = step.results
        for applied in [k for k in run.divisors if k < first - self._reach]:
            del run.divisors[applied]
        return loss, metrics

    def drain(self, run: Run) -> None:
        """Dispatches what is still to be done for the microbatches that were handed over."""
        for extra in range(self.schedule.lag if run.fed > run.start else 0):
            first = run.fed + extra * self.schedule.num_microbatches
            self._walk(Step(run, None, first))
        run.start = run.fed
        for state in run.stages:
            state.restart()
        run.divisors.clear()

    def _walk(self, step: Step) -> None:
        first, start, fed = step.first, step.run.start, step.run.fed
        assert step.run.passes is not None, "nothing was handed over yet"
        for kind, stage, offset in step.run.passes.instructions:
            if start <= first + offset < fed:
                made = self._handlers[kind](step, stage, first + offset)
                step.run.stages[stage].performed[kind] += 1
                if self.observer and made is not None:
                    self.observer(kind, stage, first + offset, made)

    # -------- the actions

    def _forward(self, step: Step, stage: int, microbatch: int) -> Any:
        run, passes, state = step.run, step.passes, step.run.stages[stage]
        runner = passes.stages[stage]
        given = self._given(step, stage, microbatch, runner.forward_reads)
        kept = given
        if runner.backward_reads != runner.forward_reads:
            kept = self._given(step, stage, microbatch, runner.backward_reads)
        version, weights = self._weights(run, stage, microbatch)
        received = self._received(state, passes, stage, microbatch)
        outputs = runner.forward(weights, given, received)
        index = runner.forward_outputs
        saved = tuple(outputs[at] for at in index.saved)
        pinned = weights if self._stashes else None
        state.stash[microbatch] = Stashed(passes, version, pinned, kept, saved)
        state.peak_in_flight = max(state.peak_in_flight, len(state.stash))
        self._tally(run, stage, passes.stash_bytes[stage])
        self._deliver(step, stage, microbatch, outputs, index)
        return outputs

    def _backward(self, step: Step, stage: int, microbatch: int) -> Any:
        run, state = step.run, step.run.stages[stage]
        passes, _, weights, given, saved = state.stash.pop(microbatch)
        runner = passes.stages[stage]
        made = runner.backward(
            state.weights if weights is None else weights,
            given,
            saved,
            _cotangents(state, microbatch),
            state.gradients,
        )
        state.gradients, returns = made
        self._tally(run, stage, -passes.stash_bytes[stage])
        self._return(run, passes, stage, microbatch, returns)
        return made

    def _input_part(self, step: Step, stage: int, microbatch: int) -> Any:
        run, state = step.run, step.run.stages[stage]
        passes, version, weights, given, saved = state.stash.pop(microbatch)
        runner = passes.stages[stage].divided
        made = runner.input_part(
            state.weights if weights is None else weights,
            given,
            saved,
            _cotangents(state, microbatch),
            state.gradients,
        )
        state.gradients, returns, held = made
        state.halfway[microbatch] = Halfway(passes, version, weights, held)
        self._tally(run, stage, passes.held_bytes[stage] - passes.stash_bytes[stage])
        self._return(run, passes, stage, microbatch, returns)
        return made

    def _weight_part(self, step: Step, stage: int, microbatch: int) -> Any:
        run, state = step.run, step.run.stages[stage]
        passes, _, weights, held = state.halfway.pop(microbatch)
        state.gradients = passes.stages[stage].divided.weight_part(
            state.weights if weights is None else weights, held, state.gradients
        )
        self._tally(run, stage, -passes.held_bytes[stage])
        return state.gradients

    def _fused(self, step: Step, stage: int, microbatch: int) -> Any:
        run, passes, state = step.run, step.passes, step.run.stages[stage]
        runner = passes.stages[stage]
        given = self._given(step, stage, microbatch, runner.fused_reads)
        _, weights = self._weights(run, stage, microbatch)
        received = self._received(state, passes, stage, microbatch)
        made = runner.fused(weights, given, received, state.gradients)
        outputs, state.gradients, returns = made
        state.peak_in_flight = max(state.peak_in_flight, 1)
        self._tally(run, stage, 0)
        self._deliver(step, stage, microbatch, outputs, runner.fused_outputs)
        self._return(run, passes, stage, microbatch, returns)
        return made

    def _whole(self, step: Step, stage: int, microbatch: int) -> Any:
        run, passes, state = step.run, step.passes, step.run.stages[stage]
        runner = passes.stages[stage]
        given = self._given(step, stage, microbatch, runner.fused_reads)
        received = self._received(state, passes, stage, microbatch)
        made = runner.whole(state.weights, given, received, state.optimizer)
        outputs, state.weights, state.optimizer, returns = made
        state.version += 1
        state.peak_in_flight = max(state.peak_in_flight, 1)
        self._tally(run, stage, 0)
        self._deliver(step, stage, microbatch, outputs, runner.fused_outputs)
        self._average(step, stage)
        self._return(run, passes, stage, microbatch, returns)
        return made

    def _update(self, step: Step, stage: int, microbatch: int) -> Any:
        state = step.run.stages[stage]
        self._average(step, stage)
        step.updating.append(stage)
        if self._updates[stage].num_phases == 1:
            self._apply(step, stage, microbatch, ())
            return state.weights
        if len(step.updating) == len(self._updates):
            self._apply_together(step, microbatch)
        return None

    def _apply_together(self, step: Step, microbatch: int) -> None:
        """Runs the phases of an update in which the stages exchange values."""
        packs: list[dict[int, Pack]] = []
        for phase in range(self._updates[0].num_phases - 1):
            sent = {}
            for stage, update in enumerate(self._updates):
                if update.sends(phase):
                    state = step.run.stages[stage]
                    received = _addressed(packs, update)
                    divisor = self._divisor(step, stage, microbatch)
                    sent[stage] = update.phases[phase](
                        state.weights, state.optimizer, state.gradients, received, divisor
                    )
            packs.append(sent)
        for stage, update in enumerate(self._updates):
            self._apply(step, stage, microbatch, _addressed(packs, update))
            if self.observer:
                self.observer("U", stage, microbatch, step.run.stages[stage].weights)

    def _apply(
        self, step: Step, stage: int, microbatch: int, packs: Sequence[dict[int, Pack]]
    ) -> None:
        state = step.run.stages[stage]
        if self._delay is not None:
            state.older[state.version] = state.weights
        state.weights, state.optimizer = self._updates[stage].phases[-1](
            state.weights,
            state.optimizer,
            state.gradients,
            tuple(packs),
            self._divisor(step, stage, microbatch),
        )
        state.gradients = None
        state.version += 1
        state.retire()
        self._tally(step.run, stage, 0)

    # -------- what goes in and what comes out

    def _weights(self, run: Run, stage: int, microbatch: int) -> tuple[int, Values]:
        """The version that a forward pass reads, and its weights."""
        state = run.stages[stage]
        if self._delay is None:
            return state.version, state.weights
        version = self._version_for(run, stage, microbatch)
        weights = state.of_version(version)
        following = microbatch + len(self.schedule.holders[stage])
        state.wanted = self._version_for(run, stage, following)
        state.retire()
        return version, weights

    def _version_for(self, run: Run, stage: int, microbatch: int) -> int:
        minibatch = (microbatch - run.start) // self.schedule.num_microbatches
        return run.stages[stage].base + max(0, minibatch - (self._delay or 0))

    def _given(self, step: Step, stage: int, microbatch: int, reads: Reads) -> Given:
        feed = step.feed
        assert feed is not None, "a forward pass outside a step"
        state: Values = ()
        if reads.state:
            model = step.run.stages[stage].model
            state = tuple(model[i] for i in feed.passes.split.stages[stage].state)
        return Given(
            feed.passes.consts[stage] if reads.consts else (),
            state,
            feed.batch[stage][microbatch - step.first] if reads.batch else (),
            (feed.keys[stage],) if reads.key else (),
            (np.uint32(microbatch),) if reads.key else (),
        )

    def _received(self, state: StageState, passes: Passes, stage: int, microbatch: int) -> Values:
        box = state.inbox.pop(microbatch, {})
        return tuple(box[at] for at in range(len(passes.split.stages[stage].receives)))

    def _deliver(
        self, step: Step, stage: int, microbatch: int, outputs: Values, index: OutputIndex
    ) -> None:
        run, passes = step.run, step.passes
        for target, pairs in passes.routes[stage].forward.items():
            values = [outputs[index.sends[here]] for here, _ in pairs]
            moved = self._transport.send(values, stage, target)
            run.sent_bytes[stage, target] += passes.routes[stage].forward_bytes[target]
            box = run.stages[target].inbox.setdefault(microbatch, {})
            box.update(zip((there for _, there in pairs), moved, strict=True))
        if index.state:
            new = tuple(outputs[at] for at in index.state)
            if self._average_state:
                run.stages[stage].new_model.append(new)
            else:
                updates = passes.split.stages[stage].updates
                run.stages[stage].model.update(zip(updates, new, strict=True))
        for result, at in zip(passes.split.stages[stage].outputs, index.results, strict=True):
            step.made.setdefault(microbatch, {})[result] = outputs[at]

    def _return(
        self, run: Run, passes: Passes, stage: int, microbatch: int, returns: Values
    ) -> None:
        for source, pairs in passes.routes[stage].backward.items():
            values = [returns[here] for here, _ in pairs]
            moved = self._transport.send(values, stage, source)
            run.sent_bytes[stage, source] += passes.routes[stage].backward_bytes[source]
            waiting = run.stages[source].returned
            if microbatch not in waiting:
                waiting[microbatch] = [{} for _ in range(passes.routes[source].num_waits)]
            for (_, there), value in zip(pairs, moved, strict=True):
                waiting[microbatch][there][stage] = value

    def _average(self, step: Step, stage: int) -> None:
        """Makes the mutable state of the minibatch out of those of its microbatches."""
        state = step.run.stages[stage]
        if not self._average_state or not state.new_model:
            return
        new = self._average_state(state.new_model)
        updates = step.passes.split.stages[stage].updates
        state.model.update(zip(updates, new, strict=True))
        state.new_model = []

    def _collect(self, step: Step) -> tuple[Any, Any, Values]:
        """The results of the minibatch, from those of its microbatches."""
        passes = step.passes
        made = []
        for microbatch in sorted(step.made):
            results = {**passes.constants, **step.made[microbatch]}
            made.append(tuple(results[at] for at in range(passes.num_results)))
        if len(made) == 1 and not passes.weighted:
            return made[0][0], None, made[0][1:]
        combined = passes.combine(made)
        if passes.weighted:
            step.run.divisors[step.first] = combined[1]
        return combined

    def _divisor(self, step: Step, stage: int, microbatch: int) -> Any:
        """What the gradients of a minibatch are divided by: its microbatches, or its weight."""
        m = self.schedule.num_microbatches
        first = microbatch // m * m
        weighted = step.run.passes is not None and step.run.passes.weighted
        if not weighted:
            return self._counts[stage]
        if first == step.first and step.results is None:
            step.results = self._collect(step)
        return step.run.divisors[first]

    def _tally(self, run: Run, stage: int, stash_bytes: int) -> None:
        """Counts what a stage holds after an action, by which its stash grew."""
        state, version_bytes = run.stages[stage], 0
        if self._stashes:
            alive = {entry.version for entry in state.stash.values()}
            alive.update(entry.version for entry in state.halfway.values())
            alive.update(state.older, (state.version,))
            version_bytes = (len(alive) - state.num_versions) * state.weight_bytes
            state.num_versions = len(alive)
            state.peak_versions = max(state.peak_versions, len(alive))
        state.stash_bytes += stash_bytes
        state.peak_stash_bytes = max(state.peak_stash_bytes, state.stash_bytes)
        run.workers[self._worker_of[stage]].add(version_bytes, stash_bytes)


def _cotangents(state: StageState, microbatch: int) -> tuple[Values, ...]:
    """Of each value that gets a cotangent back those that came, by stage."""
    came = state.returned.pop(microbatch, ())
    return tuple(tuple(parts[s] for s in sorted(parts)) for parts in came)


def _addressed(
    packs: Sequence[dict[int, Pack]], update: UpdateRunner
) -> tuple[dict[int, Pack], ...]:
    """Of the packs of each phase, those that a stage's update reads."""
    return tuple(
        {source: sent[source] for source in sources}
        for sent, sources in zip(packs, update.sources[1:], strict=False)
    )
