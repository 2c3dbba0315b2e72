"""Forward passes only, for evaluation."""

from pdjax.schedules.action import Action
from pdjax.schedules.schedule import Schedule


def forward_only(num_stages: int, num_microbatches: int) -> Schedule:
    """Every microbatch passes forward through all stages; nothing is kept and nothing changes.

    With 3 stages and 4 microbatches::

        worker 0: 0F0 0F1 0F2 0F3
        worker 1:     1F0 1F1 1F2 1F3
        worker 2:         2F0 2F1 2F2 2F3

    It is what `Pipeline.evaluate` runs. It trains nothing, so `validate` refuses it.

    Args:
        num_stages: number of stages.
        num_microbatches: microbatches that the batch is divided into.
    """
    workers = tuple(
        tuple(Action("F", stage, microbatch) for microbatch in range(num_microbatches))
        for stage in range(num_stages)
    )
    return Schedule("forward_only", num_stages, num_microbatches, workers)
