"""GPipe: all forward passes, then all backward passes."""

from pdjax.schedules.action import Action
from pdjax.schedules.schedule import Schedule


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """All microbatches forward, then all backward in reverse order, then one update.

    GPipe (arXiv 1811.06965, section 2.3 and figure 2c). With 3 stages and 3 microbatches::

        worker 0: 0F0 0F1 0F2                 0B2 0B1 0B0 0U2
        worker 1:     1F0 1F1 1F2         1B2 1B1 1B0 1U2
        worker 2:         2F0 2F1 2F2 2B2 2B1 2B0 2U2

    Synchronous: use it with the weight rule `LATEST`. All m microbatches are in flight at the
    peak. With equal stages the share of idle time is (n - 1) / (m + n - 1).

    Departs from the paper in that activations are recomputed only if an option of the `Pipeline`
    says so.

    Args:
        num_stages: number of stages n.
        num_microbatches: microbatches m in a minibatch, whose gradients are averaged.
    """
    last = num_microbatches - 1

    def actions(stage: int) -> tuple[Action, ...]:
        forward = [Action("F", stage, microbatch) for microbatch in range(num_microbatches)]
        backward = [Action("B", stage, action.microbatch) for action in reversed(forward)]
        return (*forward, *backward, Action("U", stage, last))

    workers = tuple(actions(stage) for stage in range(num_stages))
    return Schedule("gpipe", num_stages, num_microbatches, workers)
