"""Pipeline schedules: values that say what every worker does, and in which order.

One file an algorithm. To add one, write a function that returns a `Schedule` and give it a row in
`ALGORITHMS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from pdjax.schedules.gpipe import gpipe as gpipe
from pdjax.schedules.model_parallel import model_parallel as model_parallel
from pdjax.schedules.one_f_one_b import one_f_one_b as one_f_one_b
from pdjax.schedules.pipedream import pipedream as pipedream
from pdjax.schedules.schedule import Action as Action
from pdjax.schedules.schedule import Schedule as Schedule
from pdjax.schedules.schedule import ScheduleError as ScheduleError
from pdjax.schedules.validate import dispatch_order as dispatch_order
from pdjax.schedules.validate import validate as validate
from pdjax.weights import LATEST, STASH, WeightRule


@dataclass(frozen=True)
class Algorithm:
    """A published algorithm: an order of the actions, and a weight rule.

    Attributes:
        order: makes the schedule for a number of stages and of microbatches.
        weight_rule: which version of the weights each pass reads.
        about: one line for help texts.
        divides: whether minibatches are divided into microbatches unless told otherwise.
    """

    order: Callable[[int, int], Schedule]
    weight_rule: WeightRule
    about: str
    divides: bool = True


ALGORITHMS: dict[str, Algorithm] = {
    "model_parallel": Algorithm(model_parallel, LATEST, "one microbatch at a time"),
    "gpipe": Algorithm(gpipe, LATEST, "all forward passes, then all backward passes"),
    "one_f_one_b": Algorithm(one_f_one_b, LATEST, "alternating passes, an update after a flush"),
    "pipedream": Algorithm(
        pipedream, STASH, "alternating passes, never flushed, stale weights", divides=False
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
