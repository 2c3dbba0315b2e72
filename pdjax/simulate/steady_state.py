"""The figures of a schedule once it is under way.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pdjax.schedules import Schedule
from pdjax.schedules.columns import Columns
from pdjax.schedules.versions import delay_of, versions_read
from pdjax.schedules.weight_rule import WeightRule
from pdjax.simulate.stage_cost import StageCost
from pdjax.simulate.task_graph import TaskGraph
from pdjax.topology.topology import Topology

_EQUAL = 1e-9  # relative difference of times that are taken to be equal


def steady_s(
    schedule: Schedule,
    costs: Sequence[StageCost],
    topology: Topology | None = None,
    *,
    workers: Sequence[int] | None = None,
) -> float:
    """Seconds for each minibatch, once a schedule is under way.

    Of one that is flushed, the time from the end of a minibatch to the end of the next: some
    workers may begin it while others are still busy. Of another, the time from one update of its
    first stage to the next, on average over a period if they repeat:
    the pipeline fills for at least four times as many microbatches as there are workers, and is
    looked at for as long again.

    Args:
        schedule: the schedule.
        costs: of each stage, in seconds and bytes.
        topology: how the workers are joined; if None, transfers and all-reduces take no time.
        workers: for each worker of the schedule its number in the topology; the same if None.

    Raises:
        ValueError: if the costs or the workers are not for this schedule.
        ScheduleError: if an action never can start.
    """
    if schedule.flushes:
        columns = schedule.unrolled(3)
        times = TaskGraph(schedule, columns, costs, topology, workers).times()
        ends_s = times.end_s[: len(columns)]  # all-reduces come after the actions
        minibatch = columns.microbatch // schedule.num_microbatches
        last = [ends_s[minibatch == number].max(initial=0.0) for number in (1, 2)]
        return float(last[1] - last[0])
    cycles = schedule.lag + -(-4 * len(schedule.workers) // schedule.cycle)
    columns = schedule.unrolled((2 * cycles + schedule.lag + 1) * schedule.num_minibatches)
    times = TaskGraph(schedule, columns, costs, topology, workers).times()
    updates = np.flatnonzero(_updates(columns, schedule))
    each = np.count_nonzero(_updates(schedule.columns, schedule))  # in a cycle
    ends_s = times.end_s[updates[each * np.arange(cycles, 2 * cycles + 1) - 1]]
    return _rate_s(ends_s) / schedule.num_minibatches


def _rate_s(ends_s: np.ndarray) -> float:
    """Seconds from one moment to the next, on average; of a whole period if they repeat."""
    for period in range(1, len(ends_s) // 2 + 1):
        steps = ends_s[period:] - ends_s[:-period]
        if np.ptp(steps) <= _EQUAL * steps[-1]:
            return float(steps[-1]) / period
    return float(ends_s[-1] - ends_s[0]) / (len(ends_s) - 1)


def _updates(columns: Columns, schedule: Schedule) -> np.ndarray:
    """Which actions are updates of the first stage, on one of its workers."""
    mine = (columns.worker == schedule.worker_of(0)) & (columns.stage == 0)
    return mine & columns.makes("weights")


def staleness(schedule: Schedule, rule: WeightRule) -> tuple[int, ...]:
    """For each stage how many updates old its gradients are when they are applied, at the most.

    Args:
        schedule: the schedule.
        rule: which versions of the weights its passes read.
    """
    columns = schedule.unrolled(3 * (schedule.lag + 1) * schedule.num_minibatches)
    read = versions_read(columns, rule, schedule.num_microbatches, delay_of(rule, schedule))
    found = np.zeros(schedule.num_stages, np.int64)
    np.maximum.at(found, columns.stage[read.at], read.staleness)
    return tuple(found.tolist())
