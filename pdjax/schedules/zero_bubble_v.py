"""Zero bubble with two stages on each worker, laid out like the letter V."""

from pdjax.schedules.chunks import num_workers_of
from pdjax.schedules.schedule import Action, ActionKind, Schedule


def zero_bubble_v(num_stages: int, num_microbatches: int, *, num_chunks: int = 2) -> Schedule:
    """Worker w runs the stages w and 2n - 1 - w, so that the last stage is beside the first.

    ZB-V (arXiv 2401.10241, section 5). The backward pass of a microbatch starts on the worker where
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
    workers = tuple(_Worker(n, worker, num_microbatches).actions() for worker in range(n))
    return Schedule("zero_bubble_v", num_stages, num_microbatches, workers)


class _Worker:
    """Writes down what one worker does; the counts say how often it did each kind so far."""

    def __init__(self, num_workers: int, worker: int, num_microbatches: int) -> None:
        self.num_workers = num_workers
        self.worker = worker
        self.num_microbatches = num_microbatches
        self.stages = worker, 2 * num_workers - 1 - worker
        self.counts: dict[tuple[ActionKind, int], int] = {}
        self.found: list[Action] = []

    def do(self, kinds: str, chunk: int) -> None:
        """One action of each of `kinds` on a chunk, for its next microbatch."""
        for kind in "B" if kinds == "IW" and not self.stages[chunk] else kinds:
            microbatch = self.counts.get((kind, chunk), 0)  # type: ignore[arg-type]
            self.counts[kind, chunk] = microbatch + 1  # type: ignore[index]
            if microbatch < self.num_microbatches:
                self.found.append(Action(kind, self.stages[chunk], microbatch))  # type: ignore[arg-type]

    def actions(self) -> tuple[Action, ...]:
        n, w = self.num_workers, self.worker
        # Written for as many microbatches as fill the pipeline; those that there are not fall out.
        total = max(2 * n - 1, self.num_microbatches)
        for _ in range(2 * (n - w) - 1):
            self.do("F", 0)
        for _ in range(w):
            self.do("F", 1)
            self.do("F", 0)
        for _ in range(n - w):
            self.do("FIW", 1)
        while self.counts["F", 0] < total or self.counts["F", 1] < total:
            if self.counts["F", 0] < total:
                self.do("F", 0)
            self.do("IW", 0)
            self.do("FIW", 1)
        for _ in range(w):
            self.do("I", 0)
            self.do("I", 1)
        for _ in range(n - w):
            self.do("IW", 0)
        for chunk in (1, 0):
            while self.stages[chunk] and self.counts.get(("W", chunk), 0) < total:
                self.do("W", chunk)
        last = self.num_microbatches - 1
        return (*self.found, *(Action("U", stage, last) for stage in self.stages))
