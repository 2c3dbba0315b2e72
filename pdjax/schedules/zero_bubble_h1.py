"""Zero bubble, first handcrafted form: the memory of 1F1B, a third of its bubble."""

from pdjax.schedules.action import Action
from pdjax.schedules.building import alternate, in_turns
from pdjax.schedules.schedule import Schedule


def zero_bubble_h1(num_stages: int, num_microbatches: int) -> Schedule:
    """1F1B with the weight part of backward passes put off, to where a worker would wait.

    ZB-H1 (arXiv 2401.10241, section 2.1). Only the input part I of a backward pass is what the
    stage before waits for. Stage s puts off the weight part W by s microbatches, and does what is
    left of them while it waits for the last I. With 3 stages and 4 microbatches::

        worker 0: 0F0 0F1 0F2         0B0 0F3 0B1         0B2     0B3 0U3
        worker 1:     1F0 1F1     1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3 1U3
        worker 2:         2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3 2U3

    Stage 0, which sends nothing back, does both parts as one backward pass B. Synchronous: use it
    with the weight rule `LATEST`. Where F, I and W take equally long, the bubble is n - 1 of these
    instead of the 3 (n - 1) of 1F1B. On every stage at most
    min(n, m) microbatches wait for their W.

    Args:
        num_stages: number of stages n.
        num_microbatches: microbatches m in a minibatch, whose gradients are averaged.
    """

    def actions(stage: int) -> tuple[Action, ...]:
        every = range(num_microbatches)
        warm_up = num_stages - 1 - stage
        last = Action("U", stage, num_microbatches - 1)
        if stage == 0:
            passes = alternate(in_turns("F", 0, every), in_turns("B", 0, every), warm_up)
            return (*passes, last)
        found = in_turns("F", stage, range(min(warm_up, num_microbatches)))
        for microbatch in every:
            if microbatch + warm_up < num_microbatches:
                found.append(Action("F", stage, microbatch + warm_up))
            found.append(Action("I", stage, microbatch))
            if microbatch >= stage:
                found.append(Action("W", stage, microbatch - stage))
        left = range(max(0, num_microbatches - stage), num_microbatches)
        return (*found, *in_turns("W", stage, left), last)

    workers = tuple(actions(stage) for stage in range(num_stages))
    return Schedule("zero_bubble_h1", num_stages, num_microbatches, workers)
