"""What workers hold after each of their actions: a count, without any times.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdjax.schedules import Schedule
from pdjax.schedules.columns import Columns
from pdjax.schedules.lower import stash_changes
from pdjax.schedules.versions import delay_of, version_changes
from pdjax.schedules.weight_rule import LATEST, WeightRule
from pdjax.simulate.stage_cost import StageCost, check_costs


@dataclass(frozen=True, eq=False)
class Holding:
    """What workers hold, in bytes.

    Attributes:
        stash: after each action what waits for a backward pass on its worker.
        versions: after each action all versions of the weights on its worker.
        changes: whether an action changes one of them.
        initial: for each worker the version of the weights that it begins with.
    """

    stash: np.ndarray
    versions: np.ndarray
    changes: np.ndarray
    initial: np.ndarray


def peak_bytes(
    schedule: Schedule, costs: Sequence[StageCost], rule: WeightRule = LATEST
) -> tuple[int, ...]:
    """For each worker the most that it holds at once, in bytes, once a schedule is under way.

    Optimizer state and gradients of all its stages, what the largest of their passes needs while
    it runs, and the most that there is between two actions of versions of the weights and of
    activations that wait. All of it is counted; times do not matter.

    Args:
        schedule: the schedule.
        costs: of each stage.
        rule: which versions of the weights are needed.

    Raises:
        ValueError: if the costs are not for these stages.
    """
    check_costs(costs, schedule.num_stages)
    columns = schedule.unrolled(3 * (schedule.lag + 1) * schedule.num_minibatches)
    holding = holding_of(schedule, columns, costs, rule)
    peaks = holding.initial.copy()
    np.maximum.at(peaks, columns.worker, holding.stash + holding.versions)
    for stage, cost in enumerate(costs):
        peaks[list(schedule.holders[stage])] += _whole(cost.optimizer_bytes + cost.gradient_bytes)
    largest = np.zeros_like(peaks)
    for stage, cost in enumerate(costs):
        mine = list(schedule.holders[stage])
        largest[mine] = np.maximum(largest[mine], _whole(cost.pass_bytes))
    return tuple((peaks + largest).tolist())


def holding_of(
    schedule: Schedule, columns: Columns, costs: Sequence[StageCost], rule: WeightRule
) -> Holding:
    """What workers hold under a weight rule.

    Args:
        schedule: the schedule.
        columns: the same written out.
        costs: of each stage.
        rule: which versions of the weights are needed.
    """
    params = np.array([_whole(cost.param_bytes) for cost in costs])
    activations = stash_changes(columns, costs)
    delay = delay_of(rule, schedule)
    alive = version_changes(columns, rule, schedule.num_microbatches, delay)
    weights = alive * params[columns.stage]
    initial = np.zeros(columns.num_workers, np.int64)
    for stage, holders in enumerate(schedule.holders):
        initial[list(holders)] += params[stage]
    return Holding(
        _running(activations, columns),
        _running(weights, columns) + initial[columns.worker],
        (activations != 0) | (weights != 0),
        initial,
    )


def _running(steps: np.ndarray, columns: Columns) -> np.ndarray:
    """Sums of the steps of each worker so far."""
    sums = np.cumsum(steps)
    before = np.concatenate([[0], sums])[columns.starts[:-1]]
    return sums - before[columns.worker]


def _whole(size: float) -> int:
    return round(size)
