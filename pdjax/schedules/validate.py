"""Whether a schedule can be run, and does what a training step must do.

`validate` looks at the schedule written out over enough steps that its beginning, its steady state
and its drain all occur. What it accepts, the executor runs as it stands. Nothing here imports JAX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pdjax.schedules.schedule import Action, Schedule, ScheduleError, draw, inputs_of
from pdjax.weights import WeightRule, versions_read

Workers = Sequence[Sequence[Action]]


def validate(schedule: Schedule, rule: WeightRule) -> None:
    """Checks that `schedule` can run under the weight rule `rule`.

    Every stage is on one worker; every microbatch passes forward and backward through every
    stage once, forward first; every stage has one update for each minibatch, after all its
    gradients were computed; no worker waits for ever; both passes of a microbatch read the same
    version of the weights.

    Raises:
        ScheduleError: with the schedule drawn as a grid and the failing action marked.
    """
    num_steps = schedule.lag + 2
    workers = schedule.unroll(num_steps)
    _check_stages(schedule)
    _check_complete(schedule, workers, num_steps * schedule.num_microbatches)
    for worker in workers:
        _check_order(worker, workers)
        _check_updates(worker, workers, schedule.num_microbatches)
        _check_versions(worker, workers, rule)
    _check_progress(schedule, workers)
    dispatch_order(schedule)


def dispatch_order(schedule: Schedule) -> tuple[Action, ...]:
    """The actions of one step in an order in which a single thread can dispatch them.

    It keeps the order of every worker's list, and no action comes before one whose result it
    needs. Taken step after step it is also the order in which the executor drains.

    Raises:
        ScheduleError: if an action needs a result of a later step, or actions wait in a circle.
    """
    m = schedule.num_microbatches
    present = {action for worker in schedule.workers for action in worker}
    position = [0] * len(schedule.workers)
    order: list[Action] = []
    done: set[Action] = set()
    while len(order) < len(schedule.actions):
        before = len(order)
        for number, worker in enumerate(schedule.workers):
            if position[number] == len(worker):
                continue
            action = worker[position[number]]
            if all(_arrives(need, present, done, m) for need in _needs(action, schedule)):
                order.append(action)
                done.add(action)
                position[number] += 1
        if len(order) == before:
            stuck = next(
                w[p] for w, p in zip(schedule.workers, position, strict=True) if p < len(w)
            )
            raise _failure(f"{stuck} waits for ever within a step", schedule.workers, stuck)
    return tuple(order)


def _needs(action: Action, schedule: Schedule) -> list[Action]:
    return inputs_of(action, schedule.num_stages)


def _arrives(need: Action, present: set[Action], done: set[Action], m: int) -> bool:
    """Whether a result is there: made earlier in this step, or in an earlier step."""
    if need in present:
        return need in done
    steps_back = (m - 1 - need.microbatch) // m
    return any(need.shifted(m * steps) in present for steps in range(1, steps_back + 1))


def _check_stages(schedule: Schedule) -> None:
    for stage in range(schedule.num_stages):
        holders = [
            number
            for number, worker in enumerate(schedule.workers)
            if any(action.stage == stage for action in worker)
        ]
        if len(holders) != 1:
            raise ScheduleError(
                f"stage {stage} is on {len(holders)} workers {holders}; expected one.\n{schedule}"
            )


def _check_complete(schedule: Schedule, workers: Workers, fed: int) -> None:
    counts = Counter(action for worker in workers for action in worker)
    for stage in range(schedule.num_stages):
        for microbatch in range(fed):
            for kind in ("F", "B"):
                action = Action(kind, stage, microbatch)
                if counts[action] != 1:
                    what = "is missing" if not counts[action] else "is repeated"
                    raise _failure(f"{action} {what}", workers, action)


def _check_order(worker: Sequence[Action], workers: Workers) -> None:
    done: set[Action] = set()
    for action in worker:
        forward = Action("F", action.stage, action.microbatch)
        if action.kind == "B" and forward not in done:
            raise _failure(f"{action} comes before {forward}", workers, action)
        done.add(action)


def _check_updates(worker: Sequence[Action], workers: Workers, num_microbatches: int) -> None:
    """Every update applies the gradients of one whole minibatch."""
    waiting: dict[int, list[Action]] = {}
    for action in worker:
        gradients = waiting.setdefault(action.stage, [])
        if action.kind == "B":
            gradients.append(action)
        elif action.kind == "U":
            if Action("B", action.stage, action.microbatch) not in gradients:
                raise _failure(f"{action} comes before its gradient", workers, action)
            applied = sorted(gradient.microbatch for gradient in gradients)
            first = action.microbatch // num_microbatches * num_microbatches
            if applied != list(range(first, first + num_microbatches)):
                raise _failure(
                    f"{action} applies the gradients of the microbatches {applied}; expected one "
                    f"update for each minibatch, of all its {num_microbatches} microbatches",
                    workers,
                    action,
                )
            gradients.clear()
    for gradients in waiting.values():
        if gradients:
            raise _failure(
                f"no update applies the gradient of {gradients[0]}", workers, gradients[0]
            )


def _check_versions(worker: Sequence[Action], workers: Workers, rule: WeightRule) -> None:
    for read in versions_read(worker, rule):
        if read.forward != read.backward:
            action = Action("B", read.stage, read.microbatch)
            raise _failure(
                f"{action} would read version {read.backward} of the weights, its forward read "
                f"version {read.forward}; use the weight rule 'stash'",
                workers,
                action,
            )


def _check_progress(schedule: Schedule, workers: Workers) -> None:
    done: set[Action] = set()
    position = [0] * len(workers)
    moved = True
    while moved:
        moved = False
        for number, worker in enumerate(workers):
            while position[number] < len(worker):
                action = worker[position[number]]
                if not done.issuperset(_needs(action, schedule)):
                    break
                done.add(action)
                position[number] += 1
                moved = True
    for number, worker in enumerate(workers):
        if position[number] < len(worker):
            action = worker[position[number]]
            missing = [str(need) for need in _needs(action, schedule) if need not in done]
            raise _failure(f"{action} waits for ever for {', '.join(missing)}", workers, action)


def _failure(problem: str, workers: Workers, action: Action) -> ScheduleError:
    return ScheduleError(f"the schedule cannot be run: {problem}.\n{draw(workers, mark=action)}")
