"""Interleaved 1F1B: several stages on each worker."""

from itertools import pairwise

from pdjax.schedules.action import Action, ActionKind
from pdjax.schedules.building import alternate, num_workers_of
from pdjax.schedules.schedule import Schedule


def interleaved(num_stages: int, num_microbatches: int, *, num_chunks: int = 2) -> Schedule:
    """1F1B on n workers of v stages each: worker w runs the stages w, w + n and so on.

    Interleaved 1F1B (arXiv 2104.04473, section 2.2). Microbatches go in groups: a worker takes a
    group through its first stage, then through its second, and so on. With 4 stages on 2 workers
    and 3 microbatches::

        worker 0: 0F0 0F1 0F2 2F0 2F1 2F2 2B0     2B1     2B2 0B0 0B1 0B2 0U2 2U2
        worker 1:     1F0 1F1 1F2 3F0 3B0 3F1 3B1 3F2 3B2 1B0 1B1 1B2 1U2 3U2

    Synchronous: use it with the weight rule `LATEST`. With equal stages, and at least n
    microbatches, the bubble is 1 / v of that of 1F1B; for that more is sent, and more microbatches
    are in flight.

    Departs from the paper in that the number of microbatches need not be a multiple of n: they
    are divided into groups of at least n that differ by at most one.

    Args:
        num_stages: number of stages on all workers together, n v.
        num_microbatches: microbatches m in a minibatch, whose gradients are averaged.
        num_chunks: stages on each worker, v.

    Raises:
        ValueError: if the stages do not divide among workers.
    """
    n = num_workers_of("interleaved", num_stages, num_chunks)
    groups = _groups(num_microbatches, n)

    def passes(kind: ActionKind, worker: int) -> list[Action]:
        chunks = range(num_chunks) if kind == "F" else range(num_chunks - 1, -1, -1)
        return [
            Action(kind, worker + chunk * n, microbatch)
            for group in groups
            for chunk in chunks
            for microbatch in group
        ]

    def actions(worker: int) -> tuple[Action, ...]:
        warm_up = n - 1 - worker
        if num_chunks > 1:
            warm_up = 2 * warm_up + (num_chunks - 1) * len(groups[0])
        found = alternate(passes("F", worker), passes("B", worker), warm_up)
        stages = range(worker, num_stages, n)
        return (*found, *(Action("U", stage, num_microbatches - 1) for stage in stages))

    workers = tuple(actions(worker) for worker in range(n))
    return Schedule("interleaved", num_stages, num_microbatches, workers)


def _groups(num_microbatches: int, num_workers: int) -> list[range]:
    """Consecutive microbatches in groups of at least `num_workers`, the larger ones first."""
    count = max(1, num_microbatches // num_workers)
    size, larger = divmod(num_microbatches, count)
    starts = [at * size + min(at, larger) for at in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]
