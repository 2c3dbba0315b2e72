"""Plans without a search: by estimated work alone, or by names that a person gives.

Nothing here imports JAX.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pdjax.plan.plan import Plan

_SLACK = 1.1  # how much more than the best balance a stage may work for the sake of a narrow cut


def balanced_plan(
    names: Sequence[str],
    work: Sequence[float],
    cut_bytes: Sequence[int],
    num_stages: int,
    together: Sequence[tuple[int, int]] = (),
) -> Plan:
    """Divides the layers so that the busiest stage has the least to do.

    Among the divisions that come within a tenth of the best, the one that sends the fewest bytes.

    Args:
        names: the names of the layers.
        work: for each layer its work, in any unit.
        cut_bytes: for each layer the bytes that cross a cut right after it.
        num_stages: number of stages.
        together: ranges of layers (first, last) that stay in one stage, unless that leaves fewer
            than `num_stages` stages.

    Raises:
        ValueError: if there are fewer layers than stages.
    """
    check_enough_layers(names, num_stages)
    done = np.concatenate([[0.0], np.cumsum(np.asarray(work, float))])
    cost = np.asarray(cut_bytes, float)
    apart = cost.copy()
    for first, last in together:
        apart[first:last] = np.inf
    if np.isfinite(apart[:-1]).sum() >= num_stages - 1:
        cost = apart
    limit = _smallest_maximum(done, cost, num_stages) * _SLACK
    starts = _narrowest(done, cost, num_stages, limit)
    return _with_shares(tuple(names), starts, done)


def manual_plan(names: Sequence[str], work: Sequence[float], cuts: Sequence[str]) -> Plan:
    """A plan from the names of the layers or modules that begin stages 1, 2, ….

    Args:
        names: the names of the layers.
        work: for each layer its work, in any unit.
        cuts: names; that of a module stands for its first layer.

    Raises:
        ValueError: if a name is unknown or the names are not in the order of the layers.
    """
    starts = [0, *(_find_layer(names, cut) for cut in cuts)]
    if any(a >= b for a, b in pairwise(starts)):
        raise ValueError(
            f"the stages begin at {list(cuts)}, which are layers {starts[1:]} of the model; "
            "expected them in the model's order, and none at its first layer."
        )
    done = np.concatenate([[0.0], np.cumsum(np.asarray(work, float))])
    return _with_shares(tuple(names), tuple(starts), done)


def _find_layer(names: Sequence[str], cut: str) -> int:
    for at, name in enumerate(names):
        if name == cut or name.startswith(f"{cut}/"):
            return at
    near = difflib.get_close_matches(cut, names, n=1, cutoff=0)
    raise ValueError(
        f"the model has no layer or module {cut!r}. Did you mean {near[0]!r}? "
        f"Its layers are {', '.join(names)}."
    )


def check_enough_layers(names: Sequence[str], num_stages: int) -> None:
    """Raises ValueError if there are more stages than layers."""
    if len(names) < num_stages:
        raise ValueError(
            f"{num_stages} stages need at least as many layers, but the model has {len(names)}: "
            f"{', '.join(names)}. Use num_stages={len(names)} or fewer, or write the model in "
            "smaller modules."
        )


def _with_shares(names: tuple[str, ...], starts: tuple[int, ...], done: np.ndarray) -> Plan:
    bounds = [*starts, len(names)]
    total = done[-1] or 1.0
    shares = tuple(float((done[stop] - done[start]) / total) for start, stop in pairwise(bounds))
    return Plan(names, starts, shares)


def _smallest_maximum(done: np.ndarray, cut_bytes: np.ndarray, num_stages: int) -> float:
    """The least that the busiest of `num_stages` stages can have to do, with no infinite cut."""
    best = done[1:].copy()  # best[j]: the first j + 1 layers in as many stages as so far
    for _ in range(num_stages - 1):
        shorter = np.concatenate([[np.inf], np.where(np.isinf(cut_bytes), np.inf, best)[:-1]])
        last = done[1:, None] - done[None, :-1]  # work of layers i … j
        best = np.where(last >= 0, np.maximum(last, shorter[None, :]), np.inf).min(axis=1)
    return float(best[-1])


def _narrowest(
    done: np.ndarray, cut_bytes: np.ndarray, num_stages: int, limit: float
) -> tuple[int, ...]:
    """The first layers of the stages that send the fewest bytes with no stage over `limit`."""
    count = len(done) - 1
    stops = np.arange(1, count + 1)
    bytes_sent = np.where(done[1:] <= limit, 0.0, np.inf)
    choices = []
    for _ in range(num_stages - 1):
        before = np.concatenate([[np.inf], (bytes_sent + cut_bytes)[:-1]])
        last = done[1:, None] - done[None, :-1]
        allowed = (stops[:, None] > np.arange(count)[None, :]) & (last <= limit)
        table = np.where(allowed, before[None, :], np.inf)
        choices.append(table.argmin(axis=1))
        bytes_sent = table.min(axis=1)
    starts, at = [], count - 1
    for choice in reversed(choices):
        starts.append(int(choice[at]))
        at = starts[-1] - 1
    return (0, *reversed(starts))
