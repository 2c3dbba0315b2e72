"""Running a schedule without devices.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pdjax.schedules import Schedule
from pdjax.schedules.action import LETTERS
from pdjax.schedules.columns import Columns
from pdjax.schedules.weight_rule import LATEST, WeightRule
from pdjax.simulate.all_reduces import AllReduces
from pdjax.simulate.events import Times
from pdjax.simulate.memory import holding_of
from pdjax.simulate.stage_cost import StageCost
from pdjax.simulate.task_graph import TaskGraph
from pdjax.timeline.rows import Rows
from pdjax.timeline.timeline import TRANSFERS, MemorySample, Span, Timeline, Transfer
from pdjax.topology.topology import Topology

_LETTERS = np.array(list(LETTERS))


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
    """The timeline of a run of a schedule, from the costs of its stages.

    Every worker does its actions in their order, each as soon as it can. A forward pass waits for
    the activations of the stages that send to it, and for the stage before it even if that sends
    nothing; a backward pass or its input part likewise for cotangents. The updates of a stage with
    replicas wait for an all-reduce, one after the other, each of which begins when all replicas
    have the gradients of the round.

    Transfers take their bytes over the bandwidth of the innermost level of the topology that joins
    both workers, while the workers go on. Every unit of a level has one link out, on which one
    transfer follows the other in the order in which they are asked for; incoming transfers and
    all-reduces do not hold it up. (The same form as in SOSP 2019, section 3.1, with the waiting
    for links in addition; latencies are left out.)

    Example:
        >>> from pdjax.schedules import one_f_one_b
        >>> timeline = simulate(one_f_one_b(2, 3), [StageCost(1.0, 2.0)] * 2)
        >>> timeline.makespan_s, timeline.bubble_share
        (12.0, 0.25)

    Args:
        schedule: the schedule.
        costs: of each stage, in seconds and bytes.
        topology: how the workers are joined; if None, transfers and all-reduces take no time.
        rule: which versions of the weights workers keep; it changes no time.
        num_minibatches: how many minibatches are run, with the drain after the last one.
        workers: for each worker of the schedule its number in the topology; the same if None.
        title: of the timeline.

    Returns:
        A timeline that begins at 0. Its memory has an entry for each worker at 0, and one at the
        end of each action that changes the worker's bytes: a forward pass adds what it
        stashes, a backward pass takes it away, and an update changes the versions of the weights.

    Raises:
        ValueError: if the costs or the workers are not for this schedule.
        ScheduleError: if an action never can start.
    """
    columns = schedule.unrolled(num_minibatches)
    graph = TaskGraph(schedule, columns, costs, topology, workers)
    times = graph.times()
    return Timeline(
        title or f"{schedule.name}, simulated",
        columns.num_workers,
        _spans(columns, times),
        _transfers(graph, times),
        _memory(schedule, columns, costs, rule, times),
    )


def _spans(columns: Columns, times: Times) -> Rows[Span]:
    start_s, end_s = times.start_s[: len(columns)], times.end_s[: len(columns)]
    kind = _LETTERS[columns.kind]
    rows = Rows.of(Span, columns.worker, kind, columns.stage, columns.microbatch, start_s, end_s)
    return rows.sorted_by("start_s")


def _transfers(graph: TaskGraph, times: Times) -> Rows[Transfer]:
    columns, sent = graph.columns, graph.messages.take(graph.travels)
    source = sent.source
    activations = columns.makes("activations")[source]
    between = Rows.of(
        Transfer,
        columns.worker[source],
        columns.worker[sent.target],
        np.where(activations, TRANSFERS["activations"], TRANSFERS["cotangents"]),
        columns.stage[source],
        columns.microbatch[source],
        np.rint(sent.num_bytes).astype(np.int64),
        times.sent_s[graph.travels],
        times.arrived_s[graph.travels],
    )
    around = [
        _around_the_ring(each, first, times)
        for each, first in zip(graph.all_reduces, graph.firsts, strict=True)
        if each.num_bytes
    ]
    return Rows.concatenate([between, *around]).sorted_by("start_s")


def _around_the_ring(all_reduces: AllReduces, first: int, times: Times) -> Rows[Transfer]:
    """The transfers of one stage's all-reduces; `first` is the first one of its tasks."""
    ring, num_rounds = np.array(all_reduces.workers), len(all_reduces)
    tasks = np.repeat(first + np.arange(num_rounds), len(ring))
    return Rows.of(
        Transfer,
        np.tile(ring, num_rounds),
        np.tile(np.roll(ring, -1), num_rounds),
        np.full(len(tasks), TRANSFERS["gradients"]),
        np.full(len(tasks), all_reduces.stage),
        np.repeat(all_reduces.rounds.microbatch, len(ring)),
        np.full(len(tasks), round(all_reduces.num_bytes)),
        times.start_s[tasks],
        times.end_s[tasks],
    )


def _memory(
    schedule: Schedule,
    columns: Columns,
    costs: Sequence[StageCost],
    rule: WeightRule,
    times: Times,
) -> Rows[MemorySample]:
    holding = holding_of(schedule, columns, costs, rule)
    at, every = np.flatnonzero(holding.changes), np.arange(columns.num_workers)
    nothing = np.zeros(columns.num_workers, np.int64)
    begin = Rows.of(MemorySample, every, nothing.astype(float), nothing, holding.initial)
    after = Rows.of(
        MemorySample,
        columns.worker[at],
        times.end_s[at],
        holding.stash[at],
        holding.versions[at],
    )
    return Rows.concatenate([begin, after]).sorted_by("time_s")
