"""Runs a schedule.

The executor walks the actions of one step in an order that respects what they need
(`pdjax.schedules.dispatch_order`) and dispatches one compiled program for each; JAX runs the
devices concurrently. It is the interpreter of the very schedule that was validated, and nothing in
it depends on which one that is:

    F   reads the newest weights, puts what the backward pass needs into the stash, sends
    B   takes it out of the stash, adds to the stage's gradients, sends cotangents back
    U   applies the gradients

A forward and a backward pass that follow each other on a stage that waits for no cotangent in
between are one program, and so is the update if it follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pdjax.runtime.passes import InstructionKind, Passes
from pdjax.runtime.placed import Values
from pdjax.runtime.stage import Given, OutputIndex, Reads
from pdjax.runtime.transport import Transport
from pdjax.runtime.update import Pack, UpdateRunner
from pdjax.schedules import Schedule
from pdjax.weights import WeightRule


class Stashed(NamedTuple):
    """What a stage keeps of a microbatch between its forward and its backward pass.

    Attributes:
        passes: the programs that its forward pass belongs to.
        weights: the version that the forward pass read; None if the newest will do.
        given: what else of the inputs the backward pass reads.
        saved: the activations.
    """

    passes: Passes
    weights: Values | None
    given: Given
    saved: Values


@dataclass
class StageState:
    """What one stage holds.

    Attributes:
        weights: the newest version of its parameters.
        optimizer: its part of the optimizer state.
        model: its leaves of the mutable state, by index.
        version: number of updates applied.
        gradients: the sum of the gradients that no update has applied yet.
        stash: what is kept for each microbatch in flight.
        inbox: values received for forward passes to come, by microbatch and position.
        returned: cotangents received for backward passes to come.
        new_model: new values of the mutable state, where they are averaged over a minibatch.
        peak_in_flight: the most microbatches that were in flight at once.
        peak_versions: the most versions of the weights that were alive at once.
    """

    weights: Values
    optimizer: Values
    model: dict[int, Any]
    version: int = 0
    gradients: Values | None = None
    stash: dict[int, Stashed] = field(default_factory=dict)
    inbox: dict[int, dict[int, Any]] = field(default_factory=dict)
    returned: dict[int, list[dict[int, Any]]] = field(default_factory=dict)
    new_model: list[Values] = field(default_factory=list)
    peak_in_flight: int = 0
    peak_versions: int = 1


@dataclass
class Run:
    """What an executor's run holds between steps.

    Attributes:
        stages: what each stage holds.
        fed: number of microbatches handed over so far; the next one gets this number.
        start: the first microbatch after the last drain.
        passes: the programs of the last minibatch.
        divisors: for each minibatch not yet applied everywhere, by its first microbatch, the
            array that its gradients are divided by (only for weighted losses).
    """

    stages: list[StageState]
    fed: int = 0
    start: int = 0
    passes: Passes | None = None
    divisors: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Feed:
    """What a step hands to the stages.

    Attributes:
        passes: the programs for minibatches of this shape.
        batch: for each stage and microbatch its batch leaves.
        keys: for each stage the base key.
    """

    passes: Passes
    batch: Sequence[Sequence[Values]]
    keys: Sequence[Any]


@dataclass
class _Step:
    """A step that is being dispatched.

    Attributes:
        run: what holds between steps.
        feed: what the step hands over; None while draining.
        first: the number of its first microbatch.
        made: for each microbatch its results, by position.
        results: the results of the minibatch, once they were asked for.
        updating: the stages whose update was reached.
    """

    run: Run
    feed: Feed | None
    first: int
    made: dict[int, dict[int, Any]] = field(default_factory=dict)
    results: tuple[Any, Any, Values] | None = None
    updating: list[int] = field(default_factory=list)

    @property
    def passes(self) -> Passes:
        """The programs of the minibatch that the step hands over."""
        assert self.feed is not None, "nothing is handed over while draining"
        return self.feed.passes


Observer = Callable[[InstructionKind, int, int, Any], None]
"""Is told of every program dispatched: what, stage, microbatch, and the arrays it makes."""


class Executor:
    """Dispatches the steps of a schedule.

    Args:
        schedule: what to do in a step.
        rule: which weights a backward pass reads.
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
        self._updates = updates
        self._counts = counts
        self._transport = transport
        self._average_state = average_state
        self._handlers: dict[InstructionKind, Callable[[_Step, int, int], Any]] = {
            "F": self._forward,
            "B": self._backward,
            "FB": self._fused,
            "U": self._update,
            "FBU": self._whole,
        }

    def step(self, run: Run, feed: Feed) -> tuple[Any, Values]:
        """Dispatches one step; returns its loss and its metrics, leaf by leaf."""
        first = run.fed
        run.fed += self.schedule.num_microbatches
        step = _Step(run, feed, first)
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
            self._walk(_Step(run, None, first))
        run.start = run.fed
        run.divisors.clear()

    def _walk(self, step: _Step) -> None:
        first, start, fed = step.first, step.run.start, step.run.fed
        assert step.run.passes is not None, "nothing was handed over yet"
        for kind, stage, offset in step.run.passes.instructions:
            if start <= first + offset < fed:
                made = self._handlers[kind](step, stage, first + offset)
                if self.observer and made is not None:
                    self.observer(kind, stage, first + offset, made)

    # -------- the actions

    def _forward(self, step: _Step, stage: int, microbatch: int) -> Any:
        passes, state = step.passes, step.run.stages[stage]
        runner = passes.stages[stage]
        given = self._given(step, stage, microbatch, runner.forward_reads)
        kept = given
        if runner.backward_reads != runner.forward_reads:
            kept = self._given(step, stage, microbatch, runner.backward_reads)
        received = self._received(state, passes, stage, microbatch)
        outputs = runner.forward(state.weights, given, received)
        index = runner.forward_outputs
        state.stash[microbatch] = Stashed(
            passes,
            state.weights if self._stashes else None,
            kept,
            tuple(outputs[at] for at in index.saved),
        )
        self._count(state, 0)
        self._deliver(step, stage, microbatch, outputs, index)
        return outputs

    def _backward(self, step: _Step, stage: int, microbatch: int) -> Any:
        state = step.run.stages[stage]
        passes, weights, given, saved = state.stash.pop(microbatch)
        came = state.returned.pop(microbatch, ())
        cotangents = tuple(tuple(parts[s] for s in sorted(parts)) for parts in came)
        made = passes.stages[stage].backward(
            state.weights if weights is None else weights,
            given,
            saved,
            cotangents,
            state.gradients,
        )
        state.gradients, returns = made
        self._return(step.run, passes, stage, microbatch, returns)
        return made

    def _fused(self, step: _Step, stage: int, microbatch: int) -> Any:
        passes, state = step.passes, step.run.stages[stage]
        runner = passes.stages[stage]
        given = self._given(step, stage, microbatch, runner.fused_reads)
        received = self._received(state, passes, stage, microbatch)
        made = runner.fused(state.weights, given, received, state.gradients)
        outputs, state.gradients, returns = made
        self._count(state, 1)
        self._deliver(step, stage, microbatch, outputs, runner.fused_outputs)
        self._return(step.run, passes, stage, microbatch, returns)
        return made

    def _whole(self, step: _Step, stage: int, microbatch: int) -> Any:
        passes, state = step.passes, step.run.stages[stage]
        runner = passes.stages[stage]
        given = self._given(step, stage, microbatch, runner.fused_reads)
        received = self._received(state, passes, stage, microbatch)
        self._count(state, 1)
        made = runner.whole(state.weights, given, received, state.optimizer)
        outputs, state.weights, state.optimizer, returns = made
        state.version += 1
        self._deliver(step, stage, microbatch, outputs, runner.fused_outputs)
        self._average(step, stage)
        self._return(step.run, passes, stage, microbatch, returns)
        return made

    def _update(self, step: _Step, stage: int, microbatch: int) -> Any:
        state = step.run.stages[stage]
        self._average(step, stage)
        step.updating.append(stage)
        if self._updates[stage].num_phases == 1:
            self._apply(step, stage, microbatch, ())
            return state.weights
        if len(step.updating) == len(self._updates):
            self._apply_together(step, microbatch)
        return None

    def _apply_together(self, step: _Step, microbatch: int) -> None:
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
        self, step: _Step, stage: int, microbatch: int, packs: Sequence[dict[int, Pack]]
    ) -> None:
        state = step.run.stages[stage]
        state.weights, state.optimizer = self._updates[stage].phases[-1](
            state.weights,
            state.optimizer,
            state.gradients,
            tuple(packs),
            self._divisor(step, stage, microbatch),
        )
        state.gradients = None
        state.version += 1

    # -------- what goes in and what comes out

    def _given(self, step: _Step, stage: int, microbatch: int, reads: Reads) -> Given:
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
        self, step: _Step, stage: int, microbatch: int, outputs: Values, index: OutputIndex
    ) -> None:
        run, passes = step.run, step.passes
        for target, pairs in passes.routes[stage].forward.items():
            values = [outputs[index.sends[here]] for here, _ in pairs]
            moved = self._transport.send(values, stage, target)
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
            waiting = run.stages[source].returned
            if microbatch not in waiting:
                waiting[microbatch] = [{} for _ in range(passes.routes[source].num_waits)]
            for (_, there), value in zip(pairs, moved, strict=True):
                waiting[microbatch][there][stage] = value

    def _average(self, step: _Step, stage: int) -> None:
        """Makes the mutable state of the minibatch out of those of its microbatches."""
        state = step.run.stages[stage]
        if not self._average_state or not state.new_model:
            return
        new = self._average_state(state.new_model)
        updates = step.passes.split.stages[stage].updates
        state.model.update(zip(updates, new, strict=True))
        state.new_model = []

    def _collect(self, step: _Step) -> tuple[Any, Any, Values]:
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

    def _divisor(self, step: _Step, stage: int, microbatch: int) -> Any:
        """What the gradients of a minibatch are divided by: its microbatches, or its weight."""
        m = self.schedule.num_microbatches
        first = microbatch // m * m
        weighted = step.run.passes is not None and step.run.passes.weighted
        if not weighted:
            return self._counts[stage]
        if first == step.first and step.results is None:
            step.results = self._collect(step)
        return step.run.divisors[first]

    def _count(self, state: StageState, extra: int) -> None:
        state.peak_in_flight = max(state.peak_in_flight, len(state.stash) + extra)
        if self._stashes:
            kept = {id(entry.weights) for entry in state.stash.values()} | {id(state.weights)}
            state.peak_versions = max(state.peak_versions, len(kept))


def _addressed(
    packs: Sequence[dict[int, Pack]], update: UpdateRunner
) -> tuple[dict[int, Pack], ...]:
    """Of the packs of each phase, those that a stage's update reads."""
    return tuple(
        {source: sent[source] for source in sources}
        for sent, sources in zip(packs, update.sources[1:], strict=False)
    )
