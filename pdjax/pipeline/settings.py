"""The arguments of a `Pipeline`, and how a plan and a batch complete them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import optax
from jax.sharding import Sharding

from pdjax.pipeline.arguments import AUTO
from pdjax.pipeline.batch import default_num_microbatches
from pdjax.plan import Plan
from pdjax.profile.profile import Profile
from pdjax.schedules import ALGORITHMS, Schedule, find_algorithm, validate
from pdjax.schedules.weight_rule import LATEST, STASH, WeightRule
from pdjax.split.differentiate import Remat
from pdjax.topology.topology import Topology


def _text_of_value(value: Any) -> str:
    """A plan or a schedule with all that it holds, or its short form."""
    return value.to_json() if isinstance(value, (Plan, Schedule)) else str(value)


def _text_of_placements(placements: Sequence[Sharding]) -> str:
    return str([next(iter(placement.device_set)).id for placement in placements])


_NOT_COMPARED = frozenset(
    # The equations of both functions and of the optimizer are compared, and the axes of the batch
    # leaves; the first process decides, with its own profile.
    {"loss_fn", "optimizer", "eval_loss_fn", "batch_axes", "devices_given", "profile"}
)
_AS_TEXT: dict[str, tuple[str, Callable[[Any], str]]] = {
    "schedule": ("the schedule", _text_of_value),
    "weight_rule": ("the weight rule", str),
    "placements": ("the devices", _text_of_placements),
    "plan": ("the plan", _text_of_value),
    "topology": ("the topology", lambda topology: str(topology or "none")),
}
"""Names for people, and texts, of some options; others have their own name, and `str`."""


@dataclass(frozen=True)
class Settings:
    """The arguments of a `Pipeline`, read and checked; see there.

    Every field but a few (`_NOT_COMPARED`) is compared between the processes of a run: see `texts`.

    Attributes:
        placements: devices where workers may be placed.
        devices_given: whether the user gave them.
        num_stages: number of stages; None if the plan decides.
        num_chunks: stages on each worker; None for the schedule's usual number.
        replicate: whether an automatic plan may replicate stages; None for the usual choice.
        slack: forward passes beyond the smallest warm-up; None for the plan's.
        update_lag: rounds by which updates of replicated stages are late; None for the plan's.
    """

    loss_fn: Callable[..., Any]
    optimizer: optax.GradientTransformation
    schedule: str | Schedule
    weight_rule: WeightRule | None
    placements: tuple[Sharding, ...]
    devices_given: bool
    num_stages: int | None
    num_chunks: int | None
    replicate: bool | None
    slack: int | None
    update_lag: int | None
    num_microbatches: int | None
    plan: Plan | tuple[str, ...] | Literal["auto", "balanced"]
    topology: Topology | None
    profile: Profile | None
    eval_loss_fn: Callable[..., Any]
    batch_axes: Any
    weighted_loss: bool
    remat: Remat | Sequence[Remat] | None
    state_update: Literal["microbatch", "minibatch"]
    allow_stale: bool
    run_ahead: int | None
    nonfinite: Literal["raise", "ignore"]
    max_batch_shapes: int

    def for_plan(self, plan: Plan) -> Settings:
        """The settings with all that a plan decides."""
        return replace(self, plan=plan, num_stages=plan.num_stages)

    def for_processes(self, several: bool) -> Settings:
        """The settings with the usual choice of `replicate` where none was given."""
        return replace(self, replicate=may_replicate(self.replicate, several))

    def texts(self) -> dict[str, str]:
        """The options that all processes must have in common, as text by their names."""
        found = {}
        for option in fields(self):
            if option.name not in _NOT_COMPARED:
                name, as_text = _AS_TEXT.get(option.name, (option.name, str))
                found[name] = as_text(getattr(self, option.name))
        given = self.eval_loss_fn is not self.loss_fn
        return found | {"the eval_loss_fn": "one" if given else "none"}

    def for_batch(self, batch_size: int) -> Settings:
        """The settings with the number of microbatches, for minibatches of `batch_size`."""
        if self.num_microbatches is not None or not isinstance(self.schedule, str):
            return self
        count = 1
        if self.schedule == AUTO or find_algorithm(self.schedule).divides:
            stages = self.num_stages or len(self.placements) * self.chunks
            count = default_num_microbatches(batch_size, stages // self.chunks)
        return replace(self, num_microbatches=count)

    @property
    def flushes(self) -> bool:
        """Whether the pipeline is empty after each minibatch."""
        if isinstance(self.schedule, Schedule):
            return self.schedule.flushes
        return self.schedule != AUTO and not find_algorithm(self.schedule).stale

    @property
    def chunks(self) -> int:
        """Stages on each worker of a schedule that is known by its name."""
        if isinstance(self.schedule, Schedule) or self.schedule == AUTO:
            return 1
        return self.num_chunks or find_algorithm(self.schedule).num_chunks


def place_stages(plan: Plan, schedule: Schedule, placements: Sequence[Sharding]) -> list[Sharding]:
    """For each stage, and each of its replicas, where it is: as was planned, if that is there.

    Where workers run several stages, or none was planned, the schedule's workers are the first of
    `placements`.
    """
    planned = [worker for stage in plan.stages for worker in stage.workers]
    there = planned and max(planned) < len(placements)
    if not there or plan.replicas != schedule.replicas or len(schedule.workers) < len(planned):
        planned = [worker for held in schedule.holders for worker in held]
    return [placements[worker] for worker in planned]


def make_schedule(settings: Settings) -> tuple[Schedule, WeightRule]:
    """The validated schedule and weight rule, once all is resolved."""
    schedule = settings.schedule
    assert settings.num_stages is not None, "the plan has said how many"
    if isinstance(schedule, str):
        algorithm = find_algorithm(schedule)
        rule = settings.weight_rule or algorithm.weight_rule
        count = settings.num_microbatches or 1
        plan = settings.plan
        replicas = plan.replicas if isinstance(plan, Plan) else None
        slack, update_lag = _schedule_options(settings, schedule)
        made = algorithm.make(
            settings.num_stages,
            count,
            settings.num_chunks,
            replicas,
            slack=slack,
            update_lag=update_lag,
        )
        schedule = replace(made, name=schedule)
    else:
        usual = LATEST if schedule.flushes else STASH
        if schedule.name in ALGORITHMS:
            usual = ALGORITHMS[schedule.name].weight_rule
        rule = settings.weight_rule or usual
    validate(schedule, rule)
    return schedule, rule


def _schedule_options(settings: Settings, schedule: str) -> tuple[int, int]:
    """Slack and update lag: the given ones, or those of a plan for this schedule, or none."""
    slack, update_lag, plan = settings.slack, settings.update_lag, settings.plan
    if isinstance(plan, Plan) and plan.prediction and plan.prediction.schedule == schedule:
        slack = plan.slack if slack is None else slack
        update_lag = plan.update_lag if update_lag is None else update_lag
    return slack or 0, update_lag or 0


def may_replicate(given: bool | None, several: bool) -> bool:
    """Whether an automatic plan may replicate stages.

    Devices of one process share its memory, and on a CPU its cores, so that replicas bring little
    there. Those of several processes are usually on several hosts.

    Args:
        given: the user's choice, or None.
        several: whether there are several processes.
    """
    return several if given is None else given
