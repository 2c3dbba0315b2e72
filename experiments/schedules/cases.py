"""The pipeline of the guide: four workers, each with a quarter of a model that divides evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdjax.schedules import ALGORITHMS, Schedule
from pdjax.schedules.weight_rule import WeightRule
from pdjax.simulate import StageCost, peak_bytes, simulate, staleness
from pdjax.timeline.timeline import Timeline
from pdjax.topology.topology import Topology

MIB = 2**20
NUM_WORKERS = 4
NUM_MICROBATCHES = 8

# of one worker, however many stages it has; for one microbatch
FORWARD_S, INPUT_S, WEIGHT_S = 1e-3, 1e-3, 1e-3
PARAM_BYTES = 100 * MIB
STASH_BYTES = 40 * MIB
CUT_BYTES = 8 * MIB  # bytes that cross a cut, each way


def equal_stages(
    num_workers: int = NUM_WORKERS,
    num_chunks: int = 1,
    seconds: tuple[float, float, float] = (FORWARD_S, INPUT_S, WEIGHT_S),
) -> tuple[StageCost, ...]:
    """The stages of a model that divides evenly among workers, and again among their chunks.

    Args:
        num_workers: number of workers.
        num_chunks: stages on each of them.
        seconds: of the forward pass and of the two parts of the backward pass, for each worker.
    """
    num_stages = num_workers * num_chunks
    forward_s, input_s, weight_s = (each / num_chunks for each in seconds)
    return tuple(
        StageCost(
            forward_s=forward_s,
            backward_s=input_s + weight_s,
            input_s=input_s,
            weight_s=weight_s,
            param_bytes=PARAM_BYTES / num_chunks,
            gradient_bytes=PARAM_BYTES / num_chunks,
            stash_bytes=STASH_BYTES / num_chunks,
            held_bytes=STASH_BYTES / num_chunks,
            sends=((stage + 1, CUT_BYTES),) if stage + 1 < num_stages else (),
            returns=((stage - 1, CUT_BYTES),) if stage else (),
        )
        for stage in range(num_stages)
    )


@dataclass(frozen=True)
class Case:
    """A schedule for minibatches of some microbatches, and the costs of its stages.

    Attributes:
        name: of the schedule.
        schedule: the schedule.
        rule: which version of the weights its passes read.
        costs: of its stages.
        num_microbatches: microbatches that are compared. A schedule that does not divide
            minibatches is given as many minibatches of one microbatch.
    """

    name: str
    schedule: Schedule
    rule: WeightRule
    costs: tuple[StageCost, ...]
    num_microbatches: int

    @classmethod
    def of(
        cls,
        name: str,
        num_microbatches: int = NUM_MICROBATCHES,
        num_workers: int = NUM_WORKERS,
        num_chunks: int | None = None,
        seconds: tuple[float, float, float] = (FORWARD_S, INPUT_S, WEIGHT_S),
        slack: int | None = None,
    ) -> Case:
        """The case of an algorithm of `ALGORITHMS`."""
        algorithm = ALGORITHMS[name]
        chunks = num_chunks or algorithm.num_chunks
        count = num_microbatches if algorithm.divides else 1
        if slack is None:
            schedule = algorithm.make(num_workers * chunks, count, num_chunks)
        else:
            schedule = algorithm.order(num_workers, count, slack=slack)
        costs = equal_stages(num_workers, chunks, seconds)
        return cls(name, schedule, algorithm.weight_rule, costs, num_microbatches)

    @property
    def num_workers(self) -> int:
        return len(self.schedule.workers)

    @property
    def minibatches(self) -> int:
        """Minibatches in the microbatches that are compared."""
        return self.num_microbatches // self.schedule.num_microbatches

    @property
    def alone_s(self) -> float:
        """How long each worker computes for the microbatches."""
        return self.num_microbatches * sum(c.forward_s + c.backward_s for c in self._first)

    @property
    def _first(self) -> Sequence[StageCost]:
        return [self.costs[stage] for stage in self.schedule.stages_of(0)]

    def timeline(self, times: int = 1, topology: Topology | None = None) -> Timeline:
        """The timeline of as many microbatches `times` over, and the drain."""
        return simulate(
            self.schedule,
            self.costs,
            topology,
            rule=self.rule,
            num_minibatches=times * self.minibatches,
            title=self.name,
        )

    def further_s(self, topology: Topology | None = None) -> float:
        """Seconds for as many microbatches more, once under way.

        The minibatches of a schedule that is flushed may overlap, as those of `zero_bubble_v` do:
        some workers begin the next one early.
        """
        first_s, last_s = (self.timeline(times, topology).makespan_s for times in (4, 16))
        return (last_s - first_s) / 12

    def bubble_of(self, seconds: float) -> float:
        """The share of the time that workers wait if the microbatches take so long."""
        return max(0.0, 1 - self.alone_s / seconds)

    @property
    def staleness(self) -> tuple[int, ...]:
        """For each worker how many updates old its gradients are."""
        found = staleness(self.schedule, self.rule)
        every = range(self.num_workers)
        return tuple(max(found[s] for s in self.schedule.stages_of(w)) for w in every)

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """For each worker the most of weights and stash that it holds at once."""
        fixed = PARAM_BYTES  # the gradients, which all schedules have
        return tuple(peak - fixed for peak in peak_bytes(self.schedule, self.costs, self.rule))

    @property
    def sent_bytes(self) -> int:
        """What all workers send for the microbatches."""
        return sum(self.timeline().link_bytes.values())


def links(transfer_s: float, num_workers: int = NUM_WORKERS) -> Topology | None:
    """Links on which one transfer takes some time; None if it takes none."""
    return Topology.uniform(num_workers, CUT_BYTES / transfer_s) if transfer_s else None
