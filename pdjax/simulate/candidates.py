"""The schedules that may run a plan, each with the costs and the workers of its stages.

Nothing here imports JAX.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pdjax.plan.balance import balanced_plan
from pdjax.plan.plan import Plan
from pdjax.profile.profile import Profile
from pdjax.schedules import ALGORITHMS, Algorithm, Schedule, find_algorithm, validate
from pdjax.schedules.weight_rule import LATEST, STASH, WeightRule
from pdjax.simulate.costing import make_cost, profiled_costs, stage_costs
from pdjax.simulate.network import in_turns_over_units
from pdjax.simulate.simulation import simulate
from pdjax.simulate.stage_cost import StageCost
from pdjax.timeline.timeline import Timeline
from pdjax.topology.topology import Topology


@dataclass(frozen=True)
class Candidate:
    """A schedule that may run a plan.

    Attributes:
        name: of the algorithm, or of a schedule of another kind.
        schedule: the schedule.
        costs: of each of its stages, for microbatches of its size.
        rule: which version of the weights each pass reads.
        workers: for each of its workers the number in the topology.
        note: how its stages differ from those of the plan; "" if they do not.
        slack: forward passes of each stage beyond the smallest warm-up.
        update_lag: rounds by which updates of replicated stages are late.
    """

    name: str
    schedule: Schedule
    costs: tuple[StageCost, ...]
    rule: WeightRule
    workers: tuple[int, ...]
    note: str = ""
    slack: int = 0
    update_lag: int = 0

    def timeline(
        self, topology: Topology | None = None, num_minibatches: int | None = None
    ) -> Timeline:
        """The timeline of a run.

        Args:
            topology: how the workers are joined; if None, transfers take no time.
            num_minibatches: how many minibatches are run; if None, one of a schedule that is
                flushed, and of another enough to see it fill, run and drain.
        """
        schedule = self.schedule
        cycles = 2 * schedule.lag + 2
        enough = 1 if schedule.flushes else cycles * schedule.num_minibatches
        return simulate(
            schedule,
            self.costs,
            topology,
            rule=self.rule,
            num_minibatches=num_minibatches or enough,
            workers=self.workers,
            title=self.name,
        )


class Candidates:
    """Finds the candidates for a plan.

    Args:
        plan: which layers make up which stage, on which workers.
        profile: its layers; None if there is only the prediction in the plan.
        topology: the workers; None if they are all alike.
        num_microbatches: microbatches in a minibatch, of the size that the figures are for. A
            schedule that divides minibatches otherwise has larger or smaller ones.
        optimizer_bytes_per_param_byte: size of the optimizer state.

    Attributes:
        num_microbatches: microbatches in a minibatch.

    Raises:
        ValueError: if the plan predicts nothing and there is no profile, or that of another model.
    """

    def __init__(
        self,
        plan: Plan,
        profile: Profile | None = None,
        topology: Topology | None = None,
        *,
        num_microbatches: int,
        optimizer_bytes_per_param_byte: float = 2.0,
    ) -> None:
        if num_microbatches < 1:
            raise ValueError(f"num_microbatches={num_microbatches}; expected at least 1.")
        self.plan, self.profile, self.topology = plan, profile, topology
        self.num_microbatches = num_microbatches
        self.optimizer_ratio = optimizer_bytes_per_param_byte
        self.costs = stage_costs(
            plan, profile, optimizer_bytes_per_param_byte=optimizer_bytes_per_param_byte
        )

    def find(self, schedule: str | Schedule) -> Candidate:
        """The candidate that runs an algorithm, by name, or a schedule.

        Raises:
            ValueError: if it cannot be run.
        """
        if isinstance(schedule, str):
            return self.of_algorithm(schedule)
        return self.of_schedule(schedule)

    def of_algorithm(
        self, name: str, slack: int | None = None, update_lag: int | None = None
    ) -> Candidate:
        """The candidate that runs an algorithm on all workers of the plan.

        Args:
            name: of the algorithm.
            slack: of the schedule; if None, that of the plan if it was made for this algorithm.
            update_lag: likewise.

        Raises:
            ValueError: if there is no such schedule for the plan.
        """
        algorithm = find_algorithm(name)
        planned = self.plan.prediction is not None and self.plan.prediction.schedule == name
        if slack is None:
            slack = self.plan.slack if planned else 0
        if update_lag is None:
            update_lag = self.plan.update_lag if planned else 0
        schedule = self._make(algorithm, slack, update_lag)
        found = self._candidate(name, schedule, algorithm.weight_rule)
        options = {"slack": slack, "update lag": update_lag}
        notes = [f"{option} {value}" for option, value in options.items() if value]
        note = "; ".join([*notes, *([found.note] if found.note else [])])
        return replace(found, note=note, slack=slack, update_lag=update_lag)

    def choices(self, name: str) -> Iterator[Candidate]:
        """The candidates that run an algorithm, with different options, the least costly first."""
        algorithm = find_algorithm(name)
        late = algorithm.takes("update_lag") and max(self.plan.replicas) > 1
        yield self.of_algorithm(name, 0, 0)
        for slack in range(2 if algorithm.takes("slack") and self.plan.num_stages > 1 else 1):
            for update_lag in range(2 if late else 1):
                if slack or update_lag:
                    # Minibatches may be too small for more warm-up (2BW).
                    with contextlib.suppress(ValueError):
                        yield self.of_algorithm(name, slack, update_lag)

    def of_schedule(self, schedule: Schedule) -> Candidate:
        """The candidate that runs a schedule as it is.

        It runs under the weight rule of the algorithm of its name; with another name under
        `LATEST` if it is flushed, else under `STASH`.

        Raises:
            ValueError: if it cannot run under that rule, or is not for the model or the workers.
        """
        rule = LATEST if schedule.flushes else STASH
        if schedule.name in ALGORITHMS:
            rule = ALGORITHMS[schedule.name].weight_rule
        validate(schedule, rule)
        return self._candidate(schedule.name, schedule, rule)

    def _make(self, algorithm: Algorithm, slack: int, update_lag: int) -> Schedule:
        """The schedule that an algorithm has for as many workers as the plan has."""
        count = self.num_microbatches if algorithm.divides else 1
        given = self.plan.replicas
        stages, replicas = sum(given) * algorithm.num_chunks, None
        if max(given) > 1 and algorithm.replicates:
            stages, replicas = self.plan.num_stages, given
        return algorithm.make(stages, count, replicas=replicas, slack=slack, update_lag=update_lag)

    def _candidate(self, name: str, schedule: Schedule, rule: WeightRule) -> Candidate:
        costs, note = self._costs(schedule)
        larger = self.num_microbatches / schedule.num_microbatches
        scaled = tuple(cost.scaled(larger) for cost in costs)
        return Candidate(name, schedule, scaled, rule, self._workers(schedule), note)

    def _workers(self, schedule: Schedule) -> tuple[int, ...]:
        """Those of the plan, stage after stage, if they are as many; else the first ones."""
        workers = [
            worker
            for stage in self.plan.stages
            for worker in in_turns_over_units(stage.workers, self.topology)
        ]
        count = len(schedule.workers)
        return tuple(workers) if len(workers) == count else tuple(range(count))

    def _costs(self, schedule: Schedule) -> tuple[Sequence[StageCost], str]:
        """The costs of a schedule's stages, and how they differ from the plan's stages."""
        if schedule.replicas == self.plan.replicas:
            return self.costs, ""
        count = schedule.num_stages
        if self.profile is not None:
            return self._cut_evenly(self.profile, schedule), f"cut into {count} stages"
        unknown = "" if self.plan.num_stages > 1 else ", transfers unknown"
        return self._evenly(count), f"taken as {count} equal stages{unknown}"

    def _cut_evenly(self, profile: Profile, schedule: Schedule) -> Sequence[StageCost]:
        """Stages that take about equally long."""
        together = (*profile.inseparable, *(() if schedule.flushes else profile.tied))
        cuts = [int(layer.cut_bytes) for layer in profile.layers]
        count = schedule.num_stages
        plan = balanced_plan(profile.names, profile.column("compute_s"), cuts, count, together)
        recomputes = [self._recomputes] * count
        return profiled_costs(profile, plan.first_layers, recomputes, self.optimizer_ratio)

    def _evenly(self, num_stages: int) -> Sequence[StageCost]:
        """Stages that are all alike, with the widest cut of the plan between them."""
        cut = max(stage.cut_bytes for stage in self.plan.stages)
        return [
            make_cost(
                stage=stage,
                forward_s=self._total("forward_s") / num_stages,
                backward_s=self._total("backward_s") / num_stages,
                param_bytes=self._total("param_bytes") / num_stages,
                stash_bytes=self._total("stash_bytes") / num_stages,
                cuts=(cut if stage else 0.0, cut if stage + 1 < num_stages else 0.0),
                optimizer_bytes=self._total("optimizer_bytes") / num_stages,
            )
            for stage in range(num_stages)
        ]

    @property
    def _recomputes(self) -> bool:
        return "full" in self.plan.remat

    def _total(self, name: str) -> float:
        return sum(getattr(cost, name) for cost in self.costs)
