"""What a `Pipeline` was made with, and how a plan and a batch complete it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import optax
from jax.sharding import Sharding

from pdjax.batches import default_num_microbatches
from pdjax.differentiate import Remat
from pdjax.planner import Plan
from pdjax.profile import Profile
from pdjax.schedules import Schedule, find_algorithm, validate
from pdjax.topology import Topology
from pdjax.weights import LATEST, STASH, WeightRule


@dataclass(frozen=True)
class Settings:
    """What a `Pipeline` was made with; see there.

    Attributes:
        placements: where stages may be placed.
        num_stages: how many there are; None if the plan is to say.
    """

    loss_fn: Callable[..., Any]
    optimizer: optax.GradientTransformation
    schedule: str | Schedule
    weight_rule: WeightRule | None
    placements: tuple[Sharding, ...]
    num_stages: int | None
    num_microbatches: int | None
    plan: Plan | tuple[str, ...] | Literal["auto", "balanced"]
    topology: Topology | None
    profile: Profile | None
    eval_loss_fn: Callable[..., Any]
    batch_axes: Any
    weighted_loss: bool
    remat: Remat | Sequence[Remat] | None
    state_update: Literal["microbatch", "minibatch"]

    def for_plan(self, plan: Plan) -> Settings:
        """The settings with all that a plan decides."""
        placements = tuple(self.placements[at] for at in workers_of(plan, len(self.placements)))
        return replace(self, plan=plan, placements=placements, num_stages=plan.num_stages)

    def for_batch(self, batch_size: int) -> Settings:
        """The settings with the number of microbatches, for minibatches of `batch_size`."""
        if self.num_microbatches is not None or not isinstance(self.schedule, str):
            return self
        count = 1
        if find_algorithm(self.schedule).divides:
            count = default_num_microbatches(batch_size, self.num_stages or len(self.placements))
        return replace(self, num_microbatches=count)

    @property
    def flushes(self) -> bool:
        """Whether the pipeline is empty after each minibatch."""
        if isinstance(self.schedule, Schedule):
            return self.schedule.flushes
        return find_algorithm(self.schedule).order(2, self.num_microbatches or 1).flushes


def workers_of(plan: Plan, num_workers: int) -> tuple[int, ...]:
    """For each stage of a straight plan its worker: the one that was planned, if it is there."""
    planned = tuple(stage.workers[0] for stage in plan.stages)
    if planned and max(planned) < num_workers:
        return planned
    return tuple(range(plan.num_stages))


def make_schedule(settings: Settings) -> tuple[Schedule, WeightRule]:
    """The validated schedule and weight rule, once all is decided."""
    schedule = settings.schedule
    assert settings.num_stages is not None, "the plan has said how many"
    if isinstance(schedule, str):
        algorithm = find_algorithm(schedule)
        rule = settings.weight_rule or algorithm.weight_rule
        schedule = algorithm.order(settings.num_stages, settings.num_microbatches or 1)
    else:
        rule = settings.weight_rule or (LATEST if schedule.flushes else STASH)
    validate(schedule, rule)
    return schedule, rule
