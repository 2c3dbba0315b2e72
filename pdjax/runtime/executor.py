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

Several processes walk the same instructions in the same order. Each dispatches those of its own
places, and of the others takes in what they send it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from pdjax.communication.all_reduce import MeanOfState, Reduce
from pdjax.communication.ring import RingReduce
from pdjax.communication.transport import Transport
from pdjax.runtime.inputs import Given, Reads
from pdjax.runtime.programs import InstructionKind, Passes
from pdjax.runtime.replica_map import Places
from pdjax.runtime.stage import OutputIndex
from pdjax.runtime.stage_input_weight import Held
from pdjax.runtime.state import Feed, Kept, Run, StageState, Step
from pdjax.runtime.update import Pack, UpdateRunner
from pdjax.schedules import Schedule
from pdjax.schedules.dispatch import reach
from pdjax.schedules.versions import delay_of
from pdjax.schedules.weight_rule import WeightRule
from pdjax.trace.jit import Values, total

Observer = Callable[[InstructionKind, int, int, Any], None]
"""Is told of every program dispatched: what, place, microbatch, and the arrays it makes."""


class Executor:
    """Dispatches the steps of a schedule.

    Args:
        schedule: what to do in a step.
        rule: which weights the passes read.
        updates: the update of each place.
        counts: for each place what the sum of so many gradients is divided by, as arrays there.
        transport: how values travel.
        average_state: averages the new values of a stage's mutable state over the microbatches of
            a minibatch; None to update it with every microbatch.
        reduces: for each stage with replicas the sum of their gradients, and the mean of their
            mutable state if it has one.
    """

    def __init__(
        self,
        schedule: Schedule,
        rule: WeightRule,
        updates: Sequence[UpdateRunner],
        counts: Sequence[dict[int, Any]],
        transport: Transport,
        average_state: Callable[[Sequence[Values]], Values] | None = None,
        reduces: Mapping[int, tuple[Reduce, MeanOfState | None]] | None = None,
    ) -> None:
        self.schedule = schedule
        self.places = Places.of(schedule)
        self._here = transport.here
        self.observer: Observer | None = None
        self._collector = len(self.places.stage_of) - 1
        self._sizes = [schedule.per_update[stage] for stage in self.places.stage_of]
        self._reach = reach(schedule) * schedule.num_microbatches
        self._stashes = rule.backward == "stashed"
        self._delay = delay_of(rule, schedule)
        self._updates = updates
        self._counts = counts
        self._transport = transport
        self._average_state = average_state
        self._reduces = reduces or {}
        # On a CPU XLA runs what one thread dispatches in order: what waits for another process
        # would hold up the passes behind it.
        self._aside = None if all(transport.here) else ThreadPoolExecutor(1, "pdjax-all-reduce")
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
        for first in range(run.fed, run.fed + self._reach, self.schedule.num_microbatches):
            if run.fed > run.start:
                self._walk(Step(run, None, first))
        run.start = run.fed
        for state in run.stages:
            state.restart()
        run.divisors.clear()

    def _walk(self, step: Step) -> None:
        run, first = step.run, step.first
        assert run.passes is not None, "nothing was handed over yet"
        phases = run.passes.instructions
        phase = (first - run.start) // self.schedule.num_microbatches % len(phases)
        for kind, place, offset in phases[phase]:
            microbatch = first + offset
            if kind == "U" and microbatch - self._sizes[place] + 1 < run.fed:
                microbatch = min(microbatch, run.fed - 1)  # of a round that was broken off
            if run.start <= microbatch < run.fed:
                if kind == "U":
                    self._collect_first(step, place, microbatch)
                if not self._here[place]:
                    self._follow(step, kind, place, microbatch)
                    continue
                made = self._handlers[kind](step, place, microbatch)
                run.stages[place].performed[kind] += 1
                if self.observer and made is not None:
                    self.observer(kind, place, microbatch, made)

    def _follow(self, step: Step, kind: InstructionKind, place: int, microbatch: int) -> None:
        """Takes in what another process sends here, or waits for, when it runs an instruction."""
        run, stash = step.run, step.run.stages[place].stash
        if kind == "U":
            self._update(step, place, microbatch)
        elif kind in ("B", "I"):
            self._return(run, stash.pop(microbatch).passes, place, microbatch, None)
        else:
            self._deliver(step, place, microbatch, None, None)
            if kind == "F":  # its backward pass may come in another step
                stash[microbatch] = Kept(step.passes, 0, None, Given(), ())
            else:
                self._return(run, step.passes, place, microbatch, None)

    # -------- the actions

    def _forward(self, step: Step, place: int, microbatch: int) -> Any:
        run, passes, state = step.run, step.passes, step.run.stages[place]
        runner = passes.stages[place]
        given = self._given(step, place, microbatch, runner.forward_reads)
        kept = given
        if runner.backward_reads != runner.forward_reads:
            kept = self._given(step, place, microbatch, runner.backward_reads)
        version, weights = self._weights(run, place, microbatch)
        received = self._received(state, passes, place, microbatch)
        outputs = runner.forward(weights, given, received)
        index = runner.forward_outputs
        saved = tuple(outputs[at] for at in index.saved)
        pinned = weights if self._stashes else None
        state.stash[microbatch] = Kept(passes, version, pinned, kept, saved)
        state.peak_in_flight = max(state.peak_in_flight, len(state.stash))
        self._tally(run, place, passes.stash_bytes[place])
        self._deliver(step, place, microbatch, outputs, index)
        return outputs

    def _backward(self, step: Step, place: int, microbatch: int) -> Any:
        run, state = step.run, step.run.stages[place]
        passes, _, weights, given, saved = state.stash.pop(microbatch)
        update = self._update_of(run, place, microbatch)
        runner = passes.stages[place]
        made = runner.backward(
            state.weights if weights is None else weights,
            given,
            saved,
            _cotangents(state, microbatch),
            state.gradients.pop(update, None),
        )
        state.gradients[update], returns = made
        self._begin_reduce(run, place, microbatch)
        self._tally(run, place, -passes.stash_bytes[place])
        self._return(run, passes, place, microbatch, returns)
        return made

    def _input_part(self, step: Step, place: int, microbatch: int) -> Any:
        run, state = step.run, step.run.stages[place]
        passes, version, weights, given, saved = state.stash.pop(microbatch)
        update = self._update_of(run, place, microbatch)
        runner = passes.stages[place].divided
        made = runner.input_part(
            state.weights if weights is None else weights,
            given,
            saved,
            _cotangents(state, microbatch),
            state.gradients.pop(update, None),
        )
        state.gradients[update], returns, held = made
        state.halfway[microbatch] = Kept(passes, version, weights, *held)
        self._tally(run, place, passes.held_bytes[place] - passes.stash_bytes[place])
        self._return(run, passes, place, microbatch, returns)
        return made

    def _weight_part(self, step: Step, place: int, microbatch: int) -> Any:
        run, state = step.run, step.run.stages[place]
        passes, _, weights, given, values = state.halfway.pop(microbatch)
        update = self._update_of(run, place, microbatch)
        state.gradients[update] = sums = passes.stages[place].divided.weight_part(
            state.weights if weights is None else weights,
            Held(given, values),
            state.gradients.pop(update, None),
        )
        self._begin_reduce(run, place, microbatch)
        self._tally(run, place, -passes.held_bytes[place])
        return sums

    def _fused(self, step: Step, place: int, microbatch: int) -> Any:
        run, passes, state = step.run, step.passes, step.run.stages[place]
        runner = passes.stages[place]
        given = self._given(step, place, microbatch, runner.fused_reads)
        _, weights = self._weights(run, place, microbatch)
        received = self._received(state, passes, place, microbatch)
        update = self._update_of(run, place, microbatch)
        made = runner.fused(weights, given, received, state.gradients.pop(update, None))
        outputs, state.gradients[update], returns = made
        self._begin_reduce(run, place, microbatch)
        state.peak_in_flight = max(state.peak_in_flight, 1)
        self._tally(run, place, 0)
        self._deliver(step, place, microbatch, outputs, runner.fused_outputs)
        self._return(run, passes, place, microbatch, returns)
        return made

    def _whole(self, step: Step, place: int, microbatch: int) -> Any:
        run, passes, state = step.run, step.passes, step.run.stages[place]
        runner = passes.stages[place]
        given = self._given(step, place, microbatch, runner.fused_reads)
        received = self._received(state, passes, place, microbatch)
        made = runner.whole(state.weights, given, received, state.optimizer)
        outputs, state.weights, state.optimizer, returns = made
        state.version += 1
        state.peak_in_flight = max(state.peak_in_flight, 1)
        self._tally(run, place, 0)
        self._deliver(step, place, microbatch, outputs, runner.fused_outputs)
        self._average(step, place)
        self._return(run, passes, place, microbatch, returns)
        return made

    def _update(self, step: Step, place: int, microbatch: int) -> Any:
        if self._aside is None or self._ring_of(self.places.stage_of[place]) is None:
            return self._update_now(step, place, microbatch)
        # It waits for the dispatch only.
        return self._aside.submit(self._update_now, step, place, microbatch).result()

    def _update_now(self, step: Step, place: int, microbatch: int) -> Any:
        state, stage = step.run.stages[place], self.places.stage_of[place]
        update = self._update_of(step.run, place, microbatch)
        if update not in state.reduced:
            for replica in self.places.of_stage(stage):
                self._average(step, replica)
            if stage in self._reduces:
                self._reduce(step.run, stage, update)
        step.updating.append(place)
        if self._updates[place].num_phases == 1:
            self._apply(step, place, microbatch, ())
            return state.weights
        if len(step.updating) == len(self._updates):
            self._apply_together(step, microbatch)
        return None

    def _begin_reduce(self, run: Run, place: int, microbatch: int) -> None:
        """Cuts the gradients of a replica for the way, if those of all its microbatches are in."""
        stage, update = self.places.stage_of[place], self._update_of(run, place, microbatch)
        ring = self._ring_of(stage)
        if ring is None:
            return
        state, first = run.stages[place], run.start + update * self._sizes[place]
        state.summed[update] += 1
        turns = (self._turn(run, first + n) for n in range(self._sizes[place]))
        if state.summed[update] == sum(self.places.pick(stage, turn) == place for turn in turns):
            sums, at = state.gradients[update], place - self.places.of_stage(stage)[0]
            assert sums is not None
            state.gradients[update] = ring.begin(at, sums)

    def _ring_of(self, stage: int) -> RingReduce | None:
        """What sums the gradients of a stage's replicas, if it is made of transfers."""
        reduce = self._reduces[stage][0] if stage in self._reduces else None
        return reduce if isinstance(reduce, RingReduce) else None

    def _reduce(self, run: Run, stage: int, update: int) -> None:
        """Sums the gradients of a stage's replicas, and averages their mutable state."""
        places = self.places.of_stage(stage)
        states = [run.stages[place] for place in places]
        gradients, model = self._reduces[stage]
        for place in filter(self._here.__getitem__, places):
            following = places[(place + 1 - places[0]) % len(places)]  # around a ring
            run.sent_bytes[place, following] += gradients.sent_bytes
        parts = [state.gradients.get(update) for state in states]
        for state, sums in zip(states, gradients(parts), strict=True):
            state.gradients[update] = sums
            state.reduced.add(update)
        if model is not None:
            model([state.model for state in states])

    def _apply_together(self, step: Step, microbatch: int) -> None:
        """Runs the phases of an update in which the stages exchange values."""
        packs: list[list[dict[int, Pack]]] = [[] for _ in self._updates]
        for phase in range(self._updates[0].num_phases - 1):
            for received in packs:
                received.append({})
            for stage in range(self.schedule.num_stages):
                place = self.places.of_stage(stage)[0]  # all replicas would send the same
                if self._updates[place].sends(phase):
                    self._send_pack(step, phase, place, microbatch, packs)
        for place in range(len(self._updates)):
            self._apply(step, place, microbatch, packs[place])
            if self.observer and self._here[place]:
                self.observer("U", place, microbatch, step.run.stages[place].weights)

    def _send_pack(
        self,
        step: Step,
        phase: int,
        source: int,
        microbatch: int,
        packs: Sequence[list[dict[int, Pack]]],
    ) -> None:
        """Runs a phase of an update at one place, and hands what it sends to those that need it."""
        update, stage = self._updates[source], self.places.stage_of[source]
        shapes, tree = jax.tree.flatten(update.pack_shapes[phase])
        sent = None
        if self._here[source]:
            state, divisor = step.run.stages[source], self._divisor(step, source, microbatch)
            received = tuple(packs[source][:phase])
            gradients = state.gradients[self._update_of(step.run, source, microbatch)]
            sent = jax.tree.leaves(
                update.phases[phase](state.weights, state.optimizer, gradients, received, divisor)
            )
        for target, other in enumerate(self._updates):
            if stage in other.sources[phase + 1]:
                moved = self._transport.move(sent, shapes, source, target)
                if moved is not None:
                    packs[target][phase][stage] = jax.tree.unflatten(tree, moved)

    def _apply(
        self, step: Step, place: int, microbatch: int, packs: Sequence[dict[int, Pack]]
    ) -> None:
        state, update = step.run.stages[place], self._update_of(step.run, place, microbatch)
        gradients = state.gradients.pop(update, None)
        state.reduced.discard(update)
        state.summed.pop(update, None)
        if not self._here[place]:
            return
        if self._delay is not None:
            state.older[state.version] = state.weights
        state.weights, state.optimizer = self._updates[place].phases[-1](
            state.weights,
            state.optimizer,
            gradients,
            tuple(packs),
            self._divisor(step, place, microbatch),
        )
        state.version += 1
        state.retire()
        self._tally(step.run, place, 0)

    # -------- what goes in and what comes out

    def _weights(self, run: Run, place: int, microbatch: int) -> tuple[int, Values]:
        """The version that a forward pass reads, and its weights."""
        state = run.stages[place]
        if self._delay is None:
            return state.version, state.weights
        version = self._version_for(run, place, microbatch)
        weights = state.of_version(version)
        state.wanted = self._version_for(run, place, microbatch + 1)  # there are no replicas
        state.retire()
        return version, weights

    def _version_for(self, run: Run, place: int, microbatch: int) -> int:
        minibatch = (microbatch - run.start) // self.schedule.num_microbatches
        return run.stages[place].base + max(0, minibatch - (self._delay or 0))

    def _given(self, step: Step, place: int, microbatch: int, reads: Reads) -> Given:
        feed = step.feed
        assert feed is not None, "a forward pass outside a step"
        state: Values = ()
        if reads.state:
            model = step.run.stages[place].model
            stage = feed.passes.split.stages[self.places.stage_of[place]]
            state = tuple(model[i] for i in stage.state)
        return Given(
            feed.passes.consts[place] if reads.consts else (),
            state,
            feed.batch[place][microbatch - step.first] if reads.batch else (),
            (feed.keys[place],) if reads.key else (),
            (np.uint32(microbatch),) if reads.key else (),
        )

    def _received(self, state: StageState, passes: Passes, place: int, microbatch: int) -> Values:
        box = state.inbox.pop(microbatch, {})
        stage = passes.split.stages[self.places.stage_of[place]]
        return tuple(box[at] for at in range(len(stage.receives)))

    def _deliver(
        self,
        step: Step,
        place: int,
        microbatch: int,
        outputs: Values | None,
        index: OutputIndex | None,
    ) -> None:
        """Sends what a forward pass made to where it is needed; None if it ran elsewhere."""
        run, passes, stage = step.run, step.passes, self.places.stage_of[place]
        turn, routes = self._turn(run, microbatch), passes.routes[stage]
        for later, route in routes.forward.items():
            target, values = self.places.pick(later, turn), None
            if outputs is not None and index is not None:
                values = [outputs[index.sends[here]] for here in route.sources]
                run.sent_bytes[place, target] += route.num_bytes
            moved = self._transport.move(values, route.shapes, place, target)
            if moved is not None:
                box = run.stages[target].inbox.setdefault(microbatch, {})
                box.update(zip(route.targets, moved, strict=True))
        if routes.results:
            values = [outputs[at] for at in index.results] if outputs and index else None
            moved = self._transport.move(values, routes.result_shapes, place, self._collector)
            if moved is not None:
                results = step.made.setdefault(microbatch, {})
                results.update(zip(routes.results, moved, strict=True))
        if outputs is not None and index is not None and index.state:
            new = tuple(outputs[at] for at in index.state)
            if self._average_state:
                run.stages[place].new_model.append(new)
            else:
                updates = passes.split.stages[stage].updates
                run.stages[place].model.update(zip(updates, new, strict=True))

    def _return(
        self, run: Run, passes: Passes, place: int, microbatch: int, returns: Values | None
    ) -> None:
        """Sends the cotangents that a backward pass made; None if it ran elsewhere."""
        stage, turn = self.places.stage_of[place], self._turn(run, microbatch)
        for earlier, route in passes.routes[stage].backward.items():
            target, values = self.places.pick(earlier, turn), None
            if returns is not None:
                values = [returns[here] for here in route.sources]
                run.sent_bytes[place, target] += route.num_bytes
            moved = self._transport.move(values, route.shapes, place, target)
            if moved is None:
                continue
            waiting = run.stages[target].returned
            if microbatch not in waiting:
                waiting[microbatch] = [{} for _ in range(passes.routes[earlier].num_waits)]
            for there, value in zip(route.targets, moved, strict=True):
                waiting[microbatch][there][stage] = value

    def _update_of(self, run: Run, place: int, microbatch: int) -> int:
        """The number, since the last drain, of the update that applies a microbatch's gradient."""
        return (microbatch - run.start) // self._sizes[place]

    def _turn(self, run: Run, microbatch: int) -> int:
        """The number of a microbatch in its cycle, by which replicas take turns."""
        return (microbatch - run.start) % self.schedule.cycle

    def _average(self, step: Step, place: int) -> None:
        """Makes the mutable state of the minibatch out of those of its microbatches."""
        state = step.run.stages[place]
        if not self._average_state or not state.new_model:
            return
        new = self._average_state(state.new_model)
        updates = step.passes.split.stages[self.places.stage_of[place]].updates
        state.model.update(zip(updates, new, strict=True))
        state.new_model = []

    def _collect(self, step: Step) -> tuple[Any, Any, Values]:
        """The results of the minibatch, from those of its microbatches."""
        results, combined = step.passes.results, None
        if self._here[self._collector]:
            combined = results.of_minibatch([step.made[at] for at in sorted(step.made)])
        found = self._transport.broadcast(combined, results.shapes, self._collector)
        if not results.weighted:
            return found[0], None, tuple(found[1:])
        step.run.divisors[step.first] = found[1]
        return found[0], found[1], tuple(found[2:])

    def _collect_first(self, step: Step, place: int, microbatch: int) -> None:
        """Collects the results of the minibatch if an update needs its weight.

        That is at the same turn in all processes, so that they send and receive in one order.
        """
        passes = step.run.passes
        if passes is None or not passes.results.weighted or step.results is not None:
            return
        if step.first in self._applied(step.run, place, microbatch)[1]:
            step.results = self._collect(step)

    def _divisor(self, step: Step, place: int, microbatch: int) -> Any:
        """What the gradients that are applied together are divided by.

        That is the number of their microbatches, or the weight of their minibatches.
        """
        count, minibatches = self._applied(step.run, place, microbatch)
        if step.run.passes is None or not step.run.passes.results.weighted:
            return self._counts[place][count]
        return total([step.run.divisors[minibatch] for minibatch in minibatches])

    def _applied(self, run: Run, place: int, microbatch: int) -> tuple[int, range]:
        """The number of microbatches that an update applies, and where their minibatches begin."""
        size, m = self._sizes[place], self.schedule.num_microbatches
        first = microbatch - (microbatch - run.start) % size
        return microbatch + 1 - first, range(first // m * m, microbatch + 1, m)

    def _tally(self, run: Run, place: int, stash_bytes: int) -> None:
        """Counts what a place holds after an action, by which its stash grew."""
        state, version_bytes = run.stages[place], 0
        if self._stashes:
            alive = {entry.version for entry in state.stash.values()}
            alive.update(entry.version for entry in state.halfway.values())
            alive.update(state.older, (state.version,))
            version_bytes = (len(alive) - state.num_versions) * state.weight_bytes
            state.num_versions = len(alive)
            state.peak_versions = max(state.peak_versions, len(alive))
        state.stash_bytes += stash_bytes
        state.peak_stash_bytes = max(state.peak_stash_bytes, state.stash_bytes)
        run.workers[self.places.worker_of[place]].add(version_bytes, stash_bytes)


def _cotangents(state: StageState, microbatch: int) -> tuple[Values, ...]:
    """Of each value that gets a cotangent back those that came, by stage."""
    came = state.returned.pop(microbatch, ())
    return tuple(tuple(parts[s] for s in sorted(parts)) for parts in came)
