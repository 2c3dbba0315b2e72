"""Which schedule is best for a plan: all of them simulated, side by side.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdjax.plan.plan import Plan
from pdjax.profile.profile import Profile
from pdjax.schedules import ALGORITHMS, Schedule
from pdjax.simulate.candidates import Candidate, Candidates
from pdjax.simulate.memory import peak_bytes
from pdjax.simulate.steady_state import staleness, steady_s
from pdjax.simulate.task_graph import TaskGraph
from pdjax.topology.topology import Topology
from pdjax.units import format_bytes, format_rate, format_seconds, lay_out

_CLOSE = 1.01  # times that differ by less are no reason to choose
_MICROBATCHES = 4  # for each worker: GPipe's paper finds the bubble negligible from there on


@dataclass(frozen=True)
class Outcome:
    """The figures of a plan under a schedule.

    Attributes:
        name: of the schedule.
        minibatch_s: seconds for each minibatch, once under way.
        bubble_share: the share of the workers' time in which they wait.
        peak_bytes: the most that a worker holds at once.
        fits: whether every worker has memory enough.
        staleness: how many updates old the oldest gradients are when they are applied; 0 if the
            schedule is synchronous.
        sent_bytes: bytes that all workers together send for each minibatch.
        note: how its stages differ from those of the plan; "" if they do not.
    """

    name: str
    minibatch_s: float
    bubble_share: float
    peak_bytes: int
    fits: bool
    staleness: int
    sent_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Schedules for a plan, side by side.

    ``print(comparison)`` shows it as a table.

    Attributes:
        num_microbatches: microbatches in a minibatch, of the size that the figures were for.
        batch_size: examples in such a microbatch; None if unknown.
        topology: the machines; None if transfers take no time.
        outcomes: the figures of each schedule.
        candidates: for each outcome the simulated candidate.
        left_out: pairs of a schedule and why it cannot run.
    """

    num_microbatches: int
    batch_size: int | None
    topology: Topology | None
    outcomes: tuple[Outcome, ...]
    candidates: tuple[Candidate, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        size = "" if self.batch_size is None else f" of {self.batch_size} examples"
        where = f" on {self.topology}" if self.topology else "; transfers take no time"
        lines = [f"minibatches of {self.num_microbatches} microbatches{size}{where}", ""]
        examples = (self.batch_size or 0) * self.num_microbatches
        lines.append(describe(self.outcomes, examples))
        lines += [""] * bool(self.left_out)
        lines += [f"{name} cannot run: {why.splitlines()[0]}" for name, why in self.left_out]
        return "\n".join(lines)


def compare(
    plan: Plan,
    profile: Profile | None = None,
    topology: Topology | None = None,
    *,
    num_microbatches: int | None = None,
    schedules: Iterable[str | Schedule] | None = None,
    optimizer_bytes_per_param_byte: float = 2.0,
    choose_options: bool = False,
) -> Comparison:
    """Simulates schedules for a plan.

    A schedule that needs other stages than the plan has (several on each worker, or no replicas)
    gets its own: with a profile the model is cut into other stages that take about equally long,
    without one it is taken to divide evenly. All schedules are given the same minibatches. One
    that runs a minibatch as one microbatch, such as PipeDream, is taken to need as many times
    longer for it, and to stash as many times more.

    Args:
        plan: which layers make up which stage, on which workers.
        profile: its layers; if None, the predictions of the plan for its stages are used.
        topology: the machines; the plan's own if None.
        num_microbatches: microbatches in a minibatch, each of the size that the figures are for; if
            None, as many as the plan was made for, or four for each worker if that was one.
        schedules: names of algorithms, or schedules; if None, all algorithms.
        optimizer_bytes_per_param_byte: size of the optimizer state: 2 for Adam, 0 for plain SGD.
        choose_options: whether slack and update lag of each schedule are chosen: the smallest with
            which it takes at most 1 % longer than with the best that fits. Otherwise they are
            those of the plan under the schedule that it was made for, and 0 under any other.

    Raises:
        ValueError: if the plan predicts nothing and there is no profile, if the profile is that of
            another model, or the machines are fewer than the plan needs.
    """
    topology = topology or planned_topology(plan)
    count = planned_microbatches(plan) if num_microbatches is None else num_microbatches
    candidates = Candidates(
        plan,
        profile,
        topology,
        num_microbatches=count,
        optimizer_bytes_per_param_byte=optimizer_bytes_per_param_byte,
    )
    outcomes, chosen, left_out = [], [], []
    for name in ALGORITHMS if schedules is None else schedules:
        try:
            if choose_options and isinstance(name, str):
                candidate, outcome = _best(candidates.choices(name), topology)
            else:
                candidate = candidates.find(name)
                outcome = outcome_of(candidate, topology)
            outcomes.append(outcome)
            chosen.append(candidate)
        except ValueError as error:
            left_out.append((name if isinstance(name, str) else name.name, str(error)))
    size = plan.prediction.batch_size if plan.prediction else None
    return Comparison(
        count,
        profile.batch_size if profile else size,
        topology,
        tuple(outcomes),
        tuple(chosen),
        tuple(left_out),
    )


def _best(choices: Iterable[Candidate], topology: Topology | None) -> tuple[Candidate, Outcome]:
    """The first candidate that takes at most 1 % longer than the fastest that fits."""
    pairs = [(candidate, outcome_of(candidate, topology)) for candidate in choices]
    fitting = [pair for pair in pairs if pair[1].fits] or pairs[:1]
    fastest_s = min(outcome.minibatch_s for _, outcome in fitting)
    return next(pair for pair in fitting if pair[1].minibatch_s <= fastest_s * _CLOSE)


def outcome_of(candidate: Candidate, topology: Topology | None) -> Outcome:
    """The figures of a candidate.

    Raises:
        ValueError: if the topology has fewer workers.
    """
    schedule, costs, workers = candidate.schedule, candidate.costs, candidate.workers
    minibatch_s = steady_s(schedule, costs, topology, workers=workers)
    peaks = peak_bytes(schedule, costs, candidate.rule)
    limits = topology.memory_bytes if topology else ()
    cycle = TaskGraph(
        schedule, schedule.unrolled(schedule.num_minibatches), costs, topology, workers
    )
    busy = cycle.busy_s / schedule.num_minibatches / len(schedule.workers)
    return Outcome(
        name=candidate.name,
        minibatch_s=minibatch_s,
        bubble_share=1 - busy / minibatch_s if minibatch_s else 0.0,
        peak_bytes=max(peaks),
        fits=not limits or all(peak <= limits[at] for peak, at in zip(peaks, workers, strict=True)),
        staleness=max(staleness(schedule, candidate.rule)),
        sent_bytes=round(cycle.sent_bytes / schedule.num_minibatches),
        note=candidate.note,
    )


def choose(outcomes: Sequence[Outcome], allow_stale: bool = False) -> Outcome:
    """The fastest outcome that fits into memory.

    Of those within a hundredth of its time, which is less than is known, the one that is least
    stale, and of these the one that holds least.

    Args:
        outcomes: of which it is chosen.
        allow_stale: whether gradients may be applied to other weights than they were computed with.

    Raises:
        ValueError: if none fits; the text has the table.
    """
    found = [each for each in outcomes if each.fits and (allow_stale or not each.staleness)]
    if not found:
        which = "no schedule" if allow_stale else "no synchronous schedule"
        raise ValueError(
            f"{which} fits into memory:\n\n{describe(outcomes)}\n\nUse more workers or smaller "
            "microbatches, or let stages recompute."
        )
    fastest = min(outcome.minibatch_s for outcome in found)
    close = [outcome for outcome in found if outcome.minibatch_s <= fastest * _CLOSE]
    return min(close, key=lambda outcome: (outcome.staleness, outcome.peak_bytes))


def describe(outcomes: Sequence[Outcome], examples: int = 0) -> str:
    """Outcomes as a table; with the rate of `examples` in each minibatch, if they are known."""
    head = ["schedule", "minibatch", "bubble", "peak", "sent/minibatch", "stale by", ""]
    if examples:
        head.insert(2, "examples/s")
    rows = [head]
    for outcome in outcomes:
        notes = [outcome.note] if outcome.note else []
        row = [
            outcome.name,
            format_seconds(outcome.minibatch_s),
            f"{outcome.bubble_share:.1%}",
            format_bytes(outcome.peak_bytes),
            format_bytes(outcome.sent_bytes),
            str(outcome.staleness or ""),
            "; ".join([*(["does not fit"] * (not outcome.fits)), *notes]),
        ]
        if examples:
            row.insert(2, format_rate(examples, outcome.minibatch_s))
        rows.append(row)
    return lay_out(rows)


def planned_topology(plan: Plan) -> Topology | None:
    """The machines that a plan was made for; None if it has no prediction."""
    return Topology.parse(plan.prediction.topology) if plan.prediction else None


def planned_microbatches(plan: Plan) -> int:
    """Microbatches in a minibatch: as planned, if that is several, or four for each worker."""
    planned = plan.prediction.num_microbatches if plan.prediction else 1
    return planned if planned > 1 else _MICROBATCHES * sum(plan.replicas)
