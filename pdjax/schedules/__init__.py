"""Pipeline schedules: the actions of every worker, in their order, as values.

One file an algorithm. To add one, write a function that returns a `Schedule` and give it a row in
`ALGORITHMS`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdjax.schedules.action import Action as Action
from pdjax.schedules.action import ScheduleError as ScheduleError
from pdjax.schedules.building import warm_ups as warm_ups
from pdjax.schedules.dispatch import dispatch_order as dispatch_order
from pdjax.schedules.forward_only import forward_only as forward_only
from pdjax.schedules.gpipe import gpipe as gpipe
from pdjax.schedules.interleaved import interleaved as interleaved
from pdjax.schedules.model_parallel import model_parallel as model_parallel
from pdjax.schedules.one_f_one_b import one_f_one_b as one_f_one_b
from pdjax.schedules.pipedream import pipedream as pipedream
from pdjax.schedules.pipedream_2bw import pipedream_2bw as pipedream_2bw
from pdjax.schedules.schedule import Schedule as Schedule
from pdjax.schedules.validate import validate as validate
from pdjax.schedules.weight_rule import DOUBLE_BUFFER, LATEST, STASH, VERTICAL_SYNC, WeightRule
from pdjax.schedules.zero_bubble_h1 import zero_bubble_h1 as zero_bubble_h1
from pdjax.schedules.zero_bubble_v import zero_bubble_v as zero_bubble_v


@dataclass(frozen=True)
class Algorithm:
    """A published algorithm: an order of the actions, and a weight rule.

    Attributes:
        order: makes the schedule for a number of stages and of microbatches; one with
            virtual stages takes `num_chunks`, too.
        weight_rule: which version of the weights each pass reads.
        about: one line for help texts.
        divides: whether minibatches are divided into microbatches by default.
        num_chunks: virtual stages on each worker by default; 1 if it is always one.
    """

    order: Callable[..., Schedule]
    weight_rule: WeightRule
    about: str
    divides: bool = True
    num_chunks: int = 1

    @property
    def replicates(self) -> bool:
        """Whether its stages may be replicated: none under a weight rule that fixes a version."""
        able = "replicas" in inspect.signature(self.order).parameters
        return able and self.weight_rule.forward == "newest"

    def takes(self, option: str) -> bool:
        """Whether the schedule has an option, ``"slack"`` or ``"update_lag"``.

        Updates can be late only where they wait for an all-reduce among replicas.
        """
        able = option in inspect.signature(self.order).parameters
        return able and (option != "update_lag" or self.replicates)

    @property
    def stale(self) -> bool:
        """Whether gradients are applied to other weights than they were computed with."""
        return self.weight_rule != LATEST

    def make(
        self,
        num_stages: int,
        num_microbatches: int,
        num_chunks: int | None = None,
        replicas: Sequence[int] | None = None,
        *,
        slack: int = 0,
        update_lag: int = 0,
    ) -> Schedule:
        """The schedule for a number of stages, on all workers together.

        Args:
            num_stages: number of stages.
            num_microbatches: microbatches in a minibatch.
            num_chunks: virtual stages on each worker; None for the default.
            replicas: for each stage on how many workers it is; one if None.
            slack: forward passes of each stage beyond the smallest warm-up; see `warm_ups`.
            update_lag: rounds by which updates of replicated stages are late; see `pipedream`.

        Raises:
            ValueError: if there is none for these numbers.
        """
        options = self._options(slack=slack, update_lag=update_lag)
        if replicas is not None and max(replicas) > 1:
            if not self.replicates:
                able = ", ".join(name for name, row in ALGORITHMS.items() if row.replicates)
                raise ValueError(
                    f"replicas={tuple(replicas)}, but this schedule has one worker for each "
                    f"stage. Use one of {able}, or a plan without replicas."
                )
            return self.order(num_stages, num_microbatches, replicas=replicas, **options)
        if self.num_chunks > 1:
            chunks = num_chunks or self.num_chunks
            return self.order(num_stages, num_microbatches, num_chunks=chunks)
        if num_chunks not in (None, 1):
            raise ValueError(
                f"num_chunks={num_chunks}, but this schedule runs one stage on each worker; "
                "interleaved runs several."
            )
        return self.order(num_stages, num_microbatches, **options)

    def _options(self, **given: int) -> dict[str, int]:
        """Those options that differ from 0."""
        for option, value in given.items():
            if value and not self.takes(option):
                able = ", ".join(name for name, row in ALGORITHMS.items() if row.takes(option))
                raise ValueError(
                    f"{option}={value}, but this schedule has no {option}. Leave it at 0, or use "
                    f"one of {able}."
                )
        return {option: value for option, value in given.items() if value}


ALGORITHMS: dict[str, Algorithm] = {
    "model_parallel": Algorithm(model_parallel, LATEST, "one microbatch at a time"),
    "gpipe": Algorithm(gpipe, LATEST, "all forward passes, then all backward passes"),
    "one_f_one_b": Algorithm(one_f_one_b, LATEST, "alternating passes, an update after a flush"),
    "interleaved": Algorithm(
        interleaved, LATEST, "1F1B with several stages on each worker", num_chunks=2
    ),
    "zero_bubble_h1": Algorithm(
        zero_bubble_h1, LATEST, "1F1B that puts off the weight parts of backward passes"
    ),
    "zero_bubble_v": Algorithm(
        zero_bubble_v, LATEST, "the same with two stages on each worker", num_chunks=2
    ),
    "pipedream": Algorithm(
        pipedream, STASH, "alternating passes, never flushed, stale weights", divides=False
    ),
    "pipedream_vertical_sync": Algorithm(
        pipedream, VERTICAL_SYNC, "the same, one version on all stages", divides=False
    ),
    "pipedream_2bw": Algorithm(
        pipedream_2bw, DOUBLE_BUFFER, "never flushed, an update for m microbatches, two versions"
    ),
}
"""The algorithms by name."""


def find_algorithm(name: str) -> Algorithm:
    """The algorithm called `name`.

    Raises:
        ValueError: if there is none; the text names the nearest.
    """
    if name not in ALGORITHMS:
        nearest = difflib.get_close_matches(name, ALGORITHMS, n=1, cutoff=0)[0]
        raise ValueError(
            f"unknown schedule {name!r}; expected one of {', '.join(ALGORITHMS)}. "
            f"Did you mean {nearest!r}?"
        )
    return ALGORITHMS[name]
