"""One forward, one backward, with a flush: PipeDream-Flush."""

from collections.abc import Sequence

from pdjax.schedules.action import Action
from pdjax.schedules.building import alternate, in_turns, replicas_of, warm_ups
from pdjax.schedules.schedule import Schedule


def one_f_one_b(
    num_stages: int,
    num_microbatches: int,
    *,
    replicas: Sequence[int] | None = None,
    slack: int = 0,
) -> Schedule:
    """Forward and backward passes in turn as soon as possible, then one update.

    PipeDream-Flush (arXiv 2006.09503, section 3.2), also known as 1F1B. After min(n - 1 - s, m)
    warm-up forwards stage s alternates. With 3 stages and 4 microbatches::

        worker 0: 0F0 0F1 0F2         0B0 0F3 0B1     0B2     0B3 0U3
        worker 1:     1F0 1F1     1B0 1F2 1B1 1F3 1B2     1B3 1U3
        worker 2:         2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 2U3

    Synchronous: use it with the weight rule `LATEST`. It idles as long as GPipe, but at most
    min(n - s, m) microbatches are in flight on stage s.

    Args:
        num_stages: number of stages n.
        num_microbatches: microbatches m in a minibatch, whose gradients are averaged.
        replicas: for each stage on how many workers it is; they take microbatches in turns.
        slack: see `pdjax.schedules.warm_ups`.
    """
    turns = replicas_of(num_stages, replicas)
    ahead = warm_ups(turns, slack)

    def actions(stage: int, replica: int) -> tuple[Action, ...]:
        mine = range(replica, num_microbatches, turns[stage])
        passes = alternate(in_turns("F", stage, mine), in_turns("B", stage, mine), ahead[stage])
        return (*passes, Action("U", stage, num_microbatches - 1))

    workers = tuple(actions(s, replica) for s in range(num_stages) for replica in range(turns[s]))
    return Schedule("one_f_one_b", num_stages, num_microbatches, workers)
