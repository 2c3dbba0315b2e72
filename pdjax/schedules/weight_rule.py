"""Which version of the weights a pass reads.

The schedule says *when* a stage computes, the weight rule *with which weights*. Version v of a
stage's weights is the result of v updates to its initial weights, version 0. A rule is a value;
the validator, the memory count, the simulator and the executor read the same one. Nothing here
imports JAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WeightRule:
    """Which version the passes of a microbatch read on a stage.

    Attributes:
        name: the rule's name.
        forward: the version that the forward pass reads: ``"newest"``, the newest one of the
            stage; ``"previous"``, the one with which the minibatch before began on the first stage,
            the same for a whole minibatch; ``"entry"``, the one that the first stage read for the
            microbatch.
        backward: ``"newest"``: the backward pass reads the newest version, which must be the
            one that the forward pass read; ``"stashed"``: it reads the version that the forward
            pass read, kept until then.
        replica_learning_rate: of stages with replicas under an asynchronous schedule, which make
            one update for as many minibatches as they have replicas. ``"same"``: the learning rate
            of all stages is that of the optimizer. ``"scaled"``: that of a stage with r replicas
            is r / r_0 of it, r_0 being the replicas of the first stage, as in the original
            PipeDream's code.
    """

    name: str
    forward: Literal["newest", "previous", "entry"]
    backward: Literal["newest", "stashed"]
    replica_learning_rate: Literal["same", "scaled"] = "same"


LATEST = WeightRule("latest", forward="newest", backward="newest")
"""No version but the newest is kept: for schedules that finish a minibatch before its update."""

STASH = WeightRule("stash", forward="newest", backward="stashed")
"""Weight stashing (PipeDream, SOSP 2019, section 3.3): the backward pass of a microbatch uses the
weights of its forward pass, however many updates came in between."""

VERTICAL_SYNC = WeightRule("vertical_sync", forward="entry", backward="stashed")
"""Vertical sync (PipeDream, SOSP 2019, section 3.3): all stages use for a microbatch the version
that the first one used."""

DOUBLE_BUFFER = WeightRule("double_buffer", forward="previous", backward="stashed")
"""Double-buffered weight updates (PipeDream-2BW, arXiv 2006.09503, section 3.1): every minibatch
uses the weights that the one before it began with, on all stages."""
