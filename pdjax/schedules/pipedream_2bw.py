"""PipeDream-2BW: never flushed, an update for each minibatch, two versions of the weights."""

from pdjax.schedules.action import Action
from pdjax.schedules.building import warm_ups
from pdjax.schedules.schedule import Schedule


def pipedream_2bw(num_stages: int, num_microbatches: int, *, slack: int = 0) -> Schedule:
    """Forward and backward passes in turn without a flush, and an update for every m of them.

    PipeDream-2BW (arXiv 2006.09503, section 3.1). With 2 stages, 2 microbatches, 3 steps and the
    drain::

        worker 0: 0F0 0F1     0B0 0F2 0B1 0U1 0F3 0B2 0F4 0B3 0U3 0F5 0B4     0B5 0U5
        worker 1:     1F0 1B0 1F1 1B1 1U1 1F2 1B2 1F3 1B3 1U3 1F4 1B4 1F5 1B5 1U5

    Asynchronous: use it with the weight rule `DOUBLE_BUFFER`. A minibatch uses, in both passes and
    on all stages, the weights that the minibatch before it began with, so that two versions are
    enough and every gradient is one update old. At most n - s microbatches are in flight on stage
    s.

    Args:
        num_stages: number of stages n.
        num_microbatches: microbatches m in a minibatch, whose gradients are averaged; at least as
            many as there are stages.
        slack: see `pdjax.schedules.warm_ups`.

    Raises:
        ValueError: if there are too few microbatches.
    """
    ahead = warm_ups((1,) * num_stages, slack)
    if num_microbatches < ahead[0] + 1:
        raise ValueError(
            f"pipedream_2bw with {num_stages} stages and num_microbatches={num_microbatches}: two "
            f"versions of the weights suffice for at least {ahead[0] + 1} microbatches only. Use "
            f"num_microbatches={ahead[0] + 1} or more, fewer stages, or pipedream."
        )

    def actions(stage: int) -> tuple[Action, ...]:
        found = []
        for microbatch in range(num_microbatches):
            oldest = microbatch - ahead[stage]
            found += [Action("F", stage, microbatch), Action("B", stage, oldest)]
            if (oldest + 1) % num_microbatches == 0:
                found.append(Action("U", stage, oldest))
        return tuple(found)

    workers = tuple(actions(stage) for stage in range(num_stages))
    return Schedule("pipedream_2bw", num_stages, num_microbatches, workers)
