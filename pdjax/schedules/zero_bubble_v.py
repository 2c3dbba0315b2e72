"""Zero bubble with two stages on each worker, laid out like the letter V."""

from collections import defaultdict
from itertools import count

from pdjax.schedules.action import Action
from pdjax.schedules.building import num_workers_of
from pdjax.schedules.schedule import Schedule


def zero_bubble_v(num_stages: int, num_microbatches: int, *, num_chunks: int = 2) -> Schedule:
    """Worker w runs the stages w and 2n - 1 - w, so that the last stage is beside the first.

    ZB-V (arXiv 2401.10241). The backward pass of a microbatch starts on the worker where
    its forward pass began, and every worker has the same number of microbatches in flight. With 4
    stages on 2 workers and 2 microbatches::

        worker 0: 0F0 0F1     3F0 3I0 3W0 3F1 3I1 3W1 0B0         0B1 0U1 3U1
        worker 1:     1F0 2F0 1F1 2F1 2I0 2W0 1I0 1W0 2I1 2W1 1I1 1W1 1U1 2U1

    Stage 0, which sends nothing back, does both parts as one backward pass B. Synchronous: use it
    with the weight rule `LATEST`. Where F, I and W take equally long and m >= 2n - 1, workers wait
    only while the pipeline fills and while it drains, together for n - 1 of these actions.

    Args:
        num_stages: number of stages, 2n on n workers.
        num_microbatches: microbatches m in a minibatch, whose gradients are averaged.
        num_chunks: must be 2.

    Raises:
        ValueError: if the number of stages is odd.
    """
    n = num_workers_of("zero_bubble_v", num_stages, num_chunks, (2,))
    workers = tuple(_actions(n, worker, num_microbatches) for worker in range(n))
    return Schedule("zero_bubble_v", num_stages, num_microbatches, workers)


def _actions(num_workers: int, worker: int, num_microbatches: int) -> tuple[Action, ...]:
    # Written for as many microbatches as fill the pipeline; those that there are not fall out.
    passes = _passes(num_workers, worker, max(2 * num_workers - 1, num_microbatches))
    if worker == 0:
        passes = passes.replace("I0W0", "B0")
    stages = {"0": worker, "1": 2 * num_workers - 1 - worker}
    counts: defaultdict[tuple[str, str], count[int]] = defaultdict(count)
    every = (
        (kind, stages[chunk], next(counts[kind, chunk]))
        for kind, chunk in zip(passes[::2], passes[1::2], strict=True)
    )
    kept = (Action._make(action) for action in every if action[2] < num_microbatches)
    updates = (Action("U", stage, num_microbatches - 1) for stage in stages.values())
    return (*kept, *updates)


def _passes(n: int, worker: int, total: int) -> str:
    """The kinds of a worker's passes, each with its virtual stage: ``F0`` is F of the first one.

    Args:
        n: number of workers.
        worker: the worker.
        total: microbatches, at least 2n - 1.
    """
    ahead = 2 * n - 1 - worker  # forward passes of the first virtual stage before the steady state
    return (
        "F0" * (2 * (n - worker) - 1)
        + "F1F0" * worker
        + "F1I1W1" * (n - worker)
        + "F0I0W0F1I1W1" * (total - ahead)
        + "I0W0F1I1W1" * (ahead - n)
        + "I0I1" * worker
        + "I0W0" * (n - worker)
        + "W1" * worker
        + "W0" * worker
    )
