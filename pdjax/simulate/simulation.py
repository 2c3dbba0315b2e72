"""Running a schedule without devices.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pdjax.schedules import Schedule
from pdjax.schedules.columns import KINDS, Columns
from pdjax.schedules.weight_rule import LATEST, WeightRule
from pdjax.simulate.all_reduces import Reduces
from pdjax.simulate.events import Times
from pdjax.simulate.memory import holding_of
from pdjax.simulate.stage_cost import StageCost
from pdjax.simulate.task_graph import LaidOut
from pdjax.timeline.rows import Entry, Rows
from pdjax.timeline.timeline import Held, Span, Timeline, Transfer
from pdjax.topology.topology import Topology

_KINDS = np.array(list(KINDS))


def simulate(
    schedule: Schedule,
    costs: Sequence[StageCost],
    topology: Topology | None = None,
    *,
    rule: WeightRule = LATEST,
    num_minibatches: int = 1,
    workers: Sequence[int] | None = None,
    title: str | None = None,
) -> Timeline:
    """What happens when if a schedule is run, from what its stages cost.

    Every worker does its actions in their order, each as soon as it can. A forward pass waits for
    the activations of the stages that send to it, and for the stage before it even if that sends
    nothing; a backward pass or its input part likewise for cotangents. The updates of a stage with
    replicas wait for an all-reduce, one after the other, each of which begins when all replicas
    have the gradients of the round.

    Transfers take their bytes over the bandwidth of the innermost level of the topology that joins
    both workers, while the workers go on. Every unit of a level has one link out, on which one
    transfer follows the other in the order in which they are asked for; what comes in, and
    all-reduces, do not hold it up. (The same form as in SOSP 2019, section 3.1, with the waiting
    for links in addition; latencies are left out.)

    Example:
        >>> from pdjax.schedules import one_f_one_b
        >>> timeline = simulate(one_f_one_b(2, 3), [StageCost(1.0, 2.0)] * 2)
        >>> timeline.makespan_s, timeline.bubble_share
        (12.0, 0.25)

    Args:
        schedule: what is run.
        costs: of each stage, in seconds and bytes.
        topology: how the workers are joined; if None, transfers and all-reduces take no time.
        rule: which versions of the weights workers keep; it changes no time.
        num_minibatches: how many minibatches are run, with the drain after the last one.
        workers: for each worker of the schedule its number in the topology; the same if None.
        title: of the timeline.

    Returns:
        A timeline that begins at 0. Its memory has an entry for each worker at 0, and one at the
        end of each action that changes what the worker holds: a forward pass adds what it
        stashes, a backward pass takes it away, and an update changes the versions of the weights.

    Raises:
        ValueError: if the costs or the workers are not for this schedule.
        ScheduleError: if an action waits for ever.
    """
    columns = schedule.unrolled(num_minibatches)
    laid_out = LaidOut(schedule, columns, costs, topology, workers)
    times = laid_out.times()
    return Timeline(
        title or f"{schedule.name}, simulated",
        columns.num_workers,
        _spans(columns, times),
        _transfers(laid_out, times),
        _memory(schedule, columns, costs, rule, times),
    )


def _spans(columns: Columns, times: Times) -> Rows[Span]:
    start_s, end_s = times.start_s[: len(columns)], times.end_s[: len(columns)]
    found = [columns.worker, _KINDS[columns.kind], columns.stage, columns.microbatch]
    return _sorted(Span, [*found, start_s, end_s], by="start_s")


def _transfers(laid_out: LaidOut, times: Times) -> Rows[Transfer]:
    columns, sent = laid_out.columns, laid_out.messages.taken(laid_out.travels)
    source = sent.source
    found = [
        columns.worker[source],
        columns.worker[sent.target],
        np.where(columns.kind[source] == KINDS.index("F"), "F", "B"),
        columns.stage[source],
        columns.microbatch[source],
        np.rint(sent.num_bytes).astype(np.int64),
        times.sent_s[laid_out.travels],
        times.arrived_s[laid_out.travels],
    ]
    for reduces, first in zip(laid_out.reduces, laid_out.firsts, strict=True):
        more = _around_the_ring(reduces, first, times)
        found = [np.concatenate(both) for both in zip(found, more, strict=True)]
    return _sorted(Transfer, found, by="start_s")


def _around_the_ring(reduces: Reduces, first: int, times: Times) -> list[np.ndarray]:
    """The columns of the transfers of one stage's all-reduces; `first` is that of its tasks."""
    ring, tasks = np.array(reduces.workers), first + np.arange(len(reduces.microbatch))
    num_rounds, num_workers = len(tasks), len(ring)
    size = num_rounds * num_workers if reduces.num_bytes else 0
    every = [
        np.tile(ring, num_rounds),
        np.tile(np.roll(ring, -1), num_rounds),
        np.full(num_rounds * num_workers, "R"),
        np.full(num_rounds * num_workers, reduces.stage),
        np.repeat(reduces.microbatch, num_workers),
        np.full(num_rounds * num_workers, round(reduces.num_bytes)),
        np.repeat(times.start_s[tasks], num_workers),
        np.repeat(times.end_s[tasks], num_workers),
    ]
    return [column[:size] for column in every]


def _memory(
    schedule: Schedule,
    columns: Columns,
    costs: Sequence[StageCost],
    rule: WeightRule,
    times: Times,
) -> Rows[Held]:
    holding = holding_of(schedule, columns, costs, rule)
    at, every = np.flatnonzero(holding.changes), np.arange(columns.num_workers)
    nothing = np.zeros(columns.num_workers, np.int64)
    found = [
        np.concatenate([every, columns.worker[at]]),
        np.concatenate([nothing.astype(float), times.end_s[at]]),
        np.concatenate([nothing, holding.stash[at]]),
        np.concatenate([holding.initial, holding.versions[at]]),
    ]
    return _sorted(Held, found, by="time_s")


def _sorted(kind: type[Entry], columns: Sequence[np.ndarray], by: str) -> Rows[Entry]:
    """The rows in the order of one column; equal ones stay as they are."""
    named = dict(zip(kind._fields, columns, strict=True))
    order = np.argsort(named[by], kind="stable")
    return Rows(kind, {name: column[order] for name, column in named.items()})
