"""Model parallelism without pipelining."""

from pdjax.schedules.action import Action
from pdjax.schedules.schedule import Schedule


def model_parallel(num_stages: int, num_microbatches: int = 1) -> Schedule:
    """One microbatch at a time: one stage works, the others wait.

    This is what placing layers on several devices gives by itself, and the baseline of the
    pipelining papers (PipeDream, SOSP 2019, figure 2). With 3 stages and 2 microbatches::

        worker 0: 0F0                 0B0 0F1                 0B1 0U1
        worker 1:     1F0         1B0         1F1         1B1 1U1
        worker 2:         2F0 2B0                 2F1 2B1 2U1

    Synchronous: use it with the weight rule `LATEST`. At most one microbatch is in flight.

    Args:
        num_stages: number of stages n.
        num_microbatches: microbatches m in a minibatch, whose gradients are averaged.
    """

    def actions(stage: int) -> tuple[Action, ...]:
        passes = [
            Action(kind, stage, microbatch)
            for microbatch in range(num_microbatches)
            for kind in ("F", "B")
        ]
        return (*passes, Action("U", stage, num_microbatches - 1))

    workers = tuple(actions(stage) for stage in range(num_stages))
    return Schedule("model_parallel", num_stages, num_microbatches, workers)
