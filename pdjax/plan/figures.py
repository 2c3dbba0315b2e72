"""The predictions that a plan carries, as values.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pdjax.serialization import is_amount, is_count


@dataclass(frozen=True)
class StageFigures:
    """What a stage is predicted to take; seconds and bytes for each microbatch.

    Attributes:
        workers: the workers that hold a replica of it, by number, in topology order.
        warm_up: forward passes of each worker before its first backward pass.
        remat: ``"full"`` if its backward pass repeats the forward pass, to save memory.
        forward_s: seconds that one worker takes for the forward pass of a microbatch.
        compute_s: seconds that it takes for both passes, with what it recomputes.
        stage_s: seconds for each microbatch of all its workers together, with their all-reduce.
        param_bytes: bytes of one version of its weights.
        stash_bytes: bytes that wait for the backward pass, for each microbatch in flight.
        cut_bytes: bytes that it sends to the next stage for each microbatch; about as many return.
        in_flight: the most microbatches in flight on each worker.
        peak_bytes: the most that each worker holds: versions of the weights, gradients, optimizer
            state, the stash, buffers.
        limit_bytes: memory of its smallest worker; None if unlimited.
        wire_bytes: bytes that each worker sends for each microbatch of the whole plan.
    """

    workers: tuple[int, ...]
    warm_up: int
    remat: Literal["none", "full"]
    forward_s: float
    compute_s: float
    stage_s: float
    param_bytes: float
    stash_bytes: float
    cut_bytes: float
    in_flight: int
    peak_bytes: float
    limit_bytes: float | None
    wire_bytes: float

    def __post_init__(self) -> None:
        workers = self.workers
        if not workers or not all(map(is_count, workers)) or len(set(workers)) < len(workers):
            raise ValueError(
                f"a stage has the workers {workers!r}; expected different numbers from 0 on."
            )
        for name in ("warm_up", "in_flight"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number from 0 on.")
        if self.remat not in ("none", "full"):
            raise ValueError(f"remat is {self.remat!r}; expected 'none' or 'full'.")
        check_amounts(self, ("forward_s", "compute_s", "stage_s", "peak_bytes", "wire_bytes"))
        check_amounts(self, ("param_bytes", "stash_bytes", "cut_bytes"))
        if self.limit_bytes is not None:
            check_amounts(self, ("limit_bytes",))


@dataclass(frozen=True)
class Strategy:
    """What one way to train is predicted to take.

    Attributes:
        name: such as ``"data parallelism"``.
        workers: how many workers it uses.
        microbatch_s: seconds for each microbatch, fills and drains of the pipeline included.
        wire_bytes: bytes that all workers together send for each microbatch.
        peak_bytes: the most that a worker holds.
        fits: whether every worker has that much.
    """

    name: str
    workers: int
    microbatch_s: float
    wire_bytes: float
    peak_bytes: float
    fits: bool

    def __post_init__(self) -> None:
        check_amounts(self, ("workers", "microbatch_s", "wire_bytes", "peak_bytes"))


@dataclass(frozen=True)
class Prediction:
    """What is predicted for a plan, beside other ways to train.

    Attributes:
        schedule: name of the algorithm.
        topology: the machines, in their text form.
        source: where the layers' figures come from: ``"measured"``, ``"analytic"``,
            ``"imported"``.
        num_microbatches: microbatches in a minibatch.
        batch_size: examples in a microbatch; None if unknown.
        chosen: the plan itself.
        others: other ways to train on the same machines.
        advice: what to do, in a sentence.
        limit_s: seconds for each minibatch that the busiest stage or link allows once the pipeline
            is full, if `chosen` has the time of a simulation; None if it has that limit itself.
    """

    schedule: str
    topology: str
    source: str
    num_microbatches: int
    batch_size: int | None
    chosen: Strategy
    others: tuple[Strategy, ...]
    advice: str
    limit_s: float | None = None

    def __post_init__(self) -> None:
        if not is_count(self.num_microbatches) or self.num_microbatches < 1:
            raise ValueError(f"num_microbatches is {self.num_microbatches!r}; expected at least 1.")
        if self.batch_size is not None and not is_count(self.batch_size):
            raise ValueError(f"batch_size is {self.batch_size!r}; expected a number, or null.")
        for name in ("schedule", "topology", "source", "advice"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a text.")
        if self.limit_s is not None:
            check_amounts(self, ("limit_s",))

    @property
    def minibatch_s(self) -> float:
        """Predicted seconds for each minibatch."""
        return self.chosen.microbatch_s * self.num_microbatches


def check_amounts(value: Any, names: Sequence[str]) -> None:
    """Raises ValueError if one of the fields `names` is not a finite number from 0 on."""
    for name in names:
        amount = getattr(value, name)
        if not is_amount(amount):
            raise ValueError(
                f"{name} is {amount!r}; expected a finite number that is not negative."
            )
