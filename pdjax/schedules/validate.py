"""Whether a schedule can be run, and makes complete training steps.

`validate` checks the schedule written out over enough minibatches that its beginning, its steady
state and its drain all occur. The executor runs every schedule that passes, as it stands. Nothing
here imports JAX.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pdjax.schedules.action import (
    BACKWARD,
    FORWARD,
    KINDS,
    LETTERS,
    Action,
    ActionKind,
    ScheduleError,
    makers_of,
)
from pdjax.schedules.dispatch import check_order, dispatch_phases
from pdjax.schedules.schedule import Schedule
from pdjax.schedules.text import failure
from pdjax.schedules.versions import delay_of, versions_read
from pdjax.schedules.weight_rule import LATEST, WeightRule

_FORWARD = LETTERS.index(FORWARD)
_BACKWARD = [[LETTERS.index(kind) for kind in form] for form in BACKWARD]
_UPDATES = [LETTERS.index(kind) for kind in makers_of("weights")]
_IN_ORDER = [
    (LETTERS.index(earlier), code)
    for code, row in enumerate(KINDS.values())
    for need in row.needs
    if not need.step and not need.whole_round
    for earlier in makers_of(need.result)
]
"""Pairs of kinds, of which on every stage the first comes before the second."""


def validate(schedule: Schedule, rule: WeightRule) -> None:
    """Checks that `schedule` can run under the weight rule `rule`.

    Every microbatch passes forward through every stage once, and then backward, either in one
    pass or in an input and a weight part; all on one worker. A stage is on one worker, or its
    replicas take microbatches in turns. Every stage has one update for each minibatch (of an
    asynchronous schedule with replicas, for each round of them), after all its gradients were
    computed. Every worker gets to its end. All passes of a microbatch read the same version of the
    weights, which is there.

    Raises:
        ScheduleError: with the schedule drawn as a grid and the failing action marked.
    """
    Check(schedule, rule).run()


class Check:
    """A schedule that is being validated."""

    def __init__(self, schedule: Schedule, rule: WeightRule) -> None:
        self.schedule = schedule
        self.rule = rule
        steady = 0 if schedule.flushes and rule == LATEST else 1
        self.fed = schedule.cycle * (schedule.lag + 1 + steady)
        self.columns = schedule.columns.repeated(self.fed, schedule.cycle, schedule.lag)
        self.position = np.arange(len(self.columns))

    def run(self) -> None:
        """Raises ScheduleError at the first fault."""
        self._stages()
        self._complete()
        self._places()
        self._order()
        self._updates()
        check_order(self.schedule)
        if max(self.schedule.replicas) > 1:
            dispatch_phases(self.schedule)
        self._versions()

    # -------- one check each

    def _stages(self) -> None:
        for stage, holders in enumerate(self.schedule.holders):
            if not holders:
                raise ScheduleError(
                    f"the schedule cannot be run: no worker runs stage {stage}.\n{self.schedule}"
                )

    def _complete(self) -> None:
        """Every microbatch has F and, on every stage, B or else I and W; each once."""
        c, shape = self.columns, (len(KINDS), self.schedule.num_stages, self.fed)
        slot = np.ravel_multi_index((c.kind, c.stage, c.microbatch), shape)
        counts = np.bincount(slot, minlength=int(np.prod(shape))).reshape(shape)
        repeated = counts > 1
        repeated[_UPDATES] = False
        if repeated.any():
            self._fail_at("is repeated", repeated)
        used = np.stack([(counts[codes] > 0).any(axis=0) for codes in _BACKWARD])
        mixed = used.sum(axis=0) > 1
        if mixed.any():
            stage, microbatch = np.argwhere(mixed)[0].tolist()
            whole, parts = BACKWARD
            action = Action(whole[0], stage, microbatch)
            self._fail(
                f"{action} is mixed with {' or '.join(parts)} of the same microbatch; "
                "expected either one backward pass or its two parts",
                action,
            )
        used[0] = ~used[1:].any(axis=0)
        expected = np.zeros(shape, bool)
        expected[_FORWARD] = True
        for codes, form in zip(_BACKWARD, used, strict=True):
            expected[codes] = form
        if (counts < expected).any():
            self._fail_at("is missing", counts < expected)

    def _places(self) -> None:
        """All passes of a microbatch are on one worker; replicas take turns."""
        c = self.columns
        where = self._positions()
        replicas = np.array(self.schedule.replicas)
        for stage in np.flatnonzero(replicas > 1).tolist():
            mine = self.position[(c.stage == stage) & ~c.makes("weights")]
            first = where[_FORWARD, stage, c.microbatch[mine]]
            apart = mine[c.worker[mine] != c.worker[first]]
            if apart.size:
                later = self._action(apart[0])
                action = Action(FORWARD, stage, later.microbatch)
                at = c.worker[where[_FORWARD, stage, later.microbatch]]
                self._fail(
                    f"{action} is on worker {at} and {later} on worker {c.worker[apart[0]]}; "
                    "expected all passes of a microbatch on one worker",
                    action,
                )
            holders = np.array(self.schedule.holders[stage])
            due = holders[c.microbatch[mine] % self.schedule.cycle % replicas[stage]]
            wrong = np.flatnonzero(due != c.worker[mine])
            if wrong.size:
                action = self._action(mine[wrong[0]])
                self._fail(
                    f"{action} is on worker {c.worker[mine[wrong[0]]]}, but the workers "
                    f"{holders.tolist()} of stage {stage} take its microbatches in turns; expected "
                    f"it on worker {due[wrong[0]]}, or the whole stage on one worker",
                    action,
                )

    def _order(self) -> None:
        """On its worker a pass comes after those whose results it needs, such as F before B."""
        c = self.columns
        where = self._positions()
        for first, later in _IN_ORDER:
            at = self.position[c.kind == later]
            before = where[first, c.stage[at], c.microbatch[at]]
            late = np.flatnonzero(before > at)
            if late.size:
                action = self._action(at[late[0]])
                earlier = Action(_kind(first), action.stage, action.microbatch)
                self._fail(f"{action} comes before {earlier}, which it waits for", action)

    def _updates(self) -> None:
        """Every update applies all gradients of one minibatch or round, on every replica."""
        c = self.columns
        groups = np.asarray(c.per_update(self.fed))
        by_stage = np.lexsort((self.position, c.worker, c.stage))
        places = (c.stage * c.num_workers + c.worker)[by_stage]
        for stage, holders in enumerate(self.schedule.holders):
            size = self._update_size(stage, int(groups[stage]))
            for worker in holders:
                place = stage * c.num_workers + worker
                start, stop = np.searchsorted(places, [place, place + 1])
                self._updates_of(by_stage[start:stop], size)

    def _update_size(self, stage: int, counted: int) -> int:
        """Microbatches that an update of a stage applies: of a minibatch, or of a round."""
        size = self.schedule.num_microbatches
        turns = len(self.schedule.holders[stage])
        return turns if size == 1 and counted == turns and not self.schedule.flushes else size

    def _updates_of(self, here: np.ndarray, size: int) -> None:
        """Checks the updates of one stage on one worker, whose actions are at `here`."""
        c = self.columns
        mine = c.take(here)
        gradients, updates = here[mine.makes("gradients")], here[mine.makes("weights")]
        due = c.microbatch[gradients] // size  # the update that is to apply each gradient
        applying = np.searchsorted(updates, gradients)
        early = np.flatnonzero(applying > due)
        last = np.minimum(np.arange(size, self.fed + size, size), self.fed) - 1
        if early.size:
            gradient, index = gradients[early[0]], applying[early[0]] - 1
            update = self._action(updates[index])
            text = f"{update} comes before its gradient, that of {self._action(gradient)}"
        elif len(updates) < len(last) and (due >= len(updates)).any():
            update = self._action(gradients[due >= len(updates)][-1])
            text = f"no update applies the gradient of {update}"
        elif len(updates) < len(last):  # of others' gradients: a replica applies those as well
            stage = int(c.stage[here[0]])
            update = Action(_kind(_UPDATES[0]), stage, int(last[len(updates)]))
            text = f"{update} is missing on worker {c.worker[here[0]]}"
        elif len(updates) > len(last) or (c.microbatch[updates] != last).any():
            wrong = [*(c.microbatch[updates[: len(last)]] != last), True].index(True)
            update = self._action(updates[wrong])
            text = f"{update} is repeated, or not of the last microbatch that it applies"
        else:
            return
        each = "each minibatch" if size == self.schedule.num_microbatches else "each round"
        self._fail(
            f"{text}; expected one update for {each}, of all its {size} microbatches", update
        )

    def _versions(self) -> None:
        if self.rule.forward != "newest" and max(self.schedule.replicas) > 1:
            raise ScheduleError(
                f"the weight rule {self.rule.name!r} needs stages without replicas; got "
                f"{self.schedule.replicas}. Use the weight rule 'stash'."
            )
        delay = delay_of(self.rule, self.schedule)
        read = versions_read(self.columns, self.rule, self.schedule.num_microbatches, delay)
        if read.missing.any():
            at = int(np.argmax(read.missing))
            back = self._action(read.at[at])
            action = Action(FORWARD, back.stage, back.microbatch)
            self._fail(
                f"{action} would read version {read.forward[at]} of the weights before an update "
                f"makes it, under the weight rule {self.rule.name!r}",
                action,
            )
        differs = read.forward != read.backward
        if differs.any():
            at = int(np.argmax(differs))
            action = self._action(read.at[at])
            self._fail(
                f"{action} would read version {read.backward[at]} of the weights, its forward read "
                f"version {read.forward[at]}; use the weight rule 'stash'",
                action,
            )

    # -------- help

    def _positions(self) -> np.ndarray:
        """Where the action of each kind, stage and microbatch is, or -1."""
        c = self.columns
        where = np.full((len(KINDS), self.schedule.num_stages, self.fed), -1)
        where[c.kind, c.stage, c.microbatch] = self.position
        return where

    def _action(self, at: Any) -> Action:
        c = self.columns
        return Action(_kind(int(c.kind[at])), int(c.stage[at]), int(c.microbatch[at]))

    def _fail_at(self, problem: str, wrong: np.ndarray) -> None:
        code, stage, microbatch = np.argwhere(wrong)[0].tolist()
        action = Action(_kind(code), stage, microbatch)
        self._fail(f"{action} {problem}", action)

    def _fail(self, problem: str, action: Action) -> None:
        rows = [tuple(map(Action._make, row)) for row in self.columns.rows()]
        raise failure(problem, rows, action)


def _kind(code: int) -> ActionKind:
    return tuple(KINDS)[code]
