"""PipeDream: one forward, one backward, never flushed."""

import math
from collections.abc import Sequence

from pdjax.schedules.action import Action
from pdjax.schedules.building import replicas_of, warm_ups
from pdjax.schedules.schedule import Schedule


def pipedream(
    num_stages: int,
    num_microbatches: int = 1,
    *,
    replicas: Sequence[int] | None = None,
    slack: int = 0,
    update_lag: int = 0,
) -> Schedule:
    """Forward and backward passes in turn, without ever waiting for a minibatch to end.

    PipeDream (SOSP 2019, doi 10.1145/3341301.3359646, sections 3.2 and 3.3). A minibatch is one
    microbatch, and every backward pass is followed by an update. Stage s starts with n - 1 - s
    forwards; from then on its gradients are n - 1 - s updates old. With 3 stages, 4 steps and the
    drain::

        worker 0: 0F0 0F1 0F2         0B0 0U0 0F3 0B1 0U1     0B2 0U2     0B3 0U3
        worker 1:     1F0 1F1     1B0 1U0 1F2 1B1 1U1 1F3 1B2 1U2     1B3 1U3
        worker 2:         2F0 2B0 2U0 2F1 2B1 2U1 2F2 2B2 2U2 2F3 2B3 2U3

    Asynchronous: use it with the weight rule `STASH`, under which at most n - s microbatches are in
    flight on stage s and n - s versions of its weights alive, or `VERTICAL_SYNC`, under which n
    versions are.

    The r replicas of a stage take minibatches in turns, and each applies the mean gradient of r
    consecutive ones, a round.

    Args:
        num_stages: number of stages n.
        num_microbatches: must be 1.
        replicas: for each stage on how many workers it is; they take minibatches in turns.
        slack: see `pdjax.schedules.warm_ups`.
        update_lag: by how many rounds stages with replicas apply their gradients later than they
            have them. With 1 the all-reduce of a round happens while the passes of the next one
            are computed, where otherwise the next forward pass waits for it. It costs one version
            of the weights, and as much staleness.

    Raises:
        ValueError: if a minibatch is to be more than one microbatch, or the lag is negative.
    """
    if update_lag < 0:
        raise ValueError(f"update_lag={update_lag}; expected a number of rounds from 0 on.")
    if num_microbatches != 1:
        raise ValueError(
            f"pipedream runs a minibatch as one microbatch; got num_microbatches="
            f"{num_microbatches}. Leave it at 1 and hand over smaller minibatches, or use "
            "one_f_one_b or pipedream_2bw."
        )
    turns = replicas_of(num_stages, replicas)
    ahead = warm_ups(turns, slack)
    cycle = math.lcm(*turns)

    def actions(stage: int, replica: int) -> tuple[Action, ...]:
        found = []
        for start in range(0, cycle, turns[stage]):
            oldest = start - ahead[stage] * turns[stage]  # the first of the round to go back
            found.append(Action("F", stage, start + replica))
            found.append(Action("B", stage, oldest + replica))
            late = update_lag * turns[stage] if turns[stage] > 1 else 0
            found.append(Action("U", stage, oldest + turns[stage] - 1 - late))
        return tuple(found)

    workers = tuple(actions(s, replica) for s in range(num_stages) for replica in range(turns[s]))
    return Schedule("pipedream", num_stages, 1, workers, num_minibatches=cycle)
