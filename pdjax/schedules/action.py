"""The actions of a schedule, and the table of their kinds.

`KINDS` has one row for each kind of action: the results that it needs, the results that it makes,
and its effect on the memory of its worker. Validation, dispatch order, weight versions, simulator
and drawings read this table, so a new kind is a new row here, a row in `pdjax.timeline.style` and a
program in `pdjax.runtime`. Nothing here imports JAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

ActionKind = Literal["F", "B", "I", "W", "U"]
"""Forward pass; backward pass, or its two parts: input (the cotangents for the stage before) and
weight (the gradients); update of the weights."""

Result = Literal["activations", "cotangents", "pending", "gradients", "weights"]
"""A value that an action makes for other actions; ``"pending"`` are the weight gradients that an
input part leaves to the weight part."""


class ScheduleError(ValueError):
    """A schedule that cannot be run; the text shows it as a grid with the action marked."""


class Action(NamedTuple):
    """One thing that a worker does.

    Attributes:
        kind: ``"F"``, ``"B"``, ``"I"``, ``"W"`` or ``"U"``.
        stage: the stage that it is done for.
        microbatch: the microbatch; for an update the last one whose gradient it applies.
    """

    kind: ActionKind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    def shifted(self, by: int) -> Action:
        """The same action for the microbatch `by` further on."""
        return Action(self.kind, self.stage, self.microbatch + by)


class Need(NamedTuple):
    """A result that an action waits for.

    Attributes:
        result: the result, of the same microbatch.
        step: where it is made: 0 on the action's own stage and worker, -1 on the stage before, 1
            on the stage behind.
        whole_round: whether it is needed of all microbatches of a round, from all replicas.
    """

    result: Result
    step: int = 0
    whole_round: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of action: a row of the table.

    Attributes:
        letter: its letter in schedules.
        name: its name in drawings and traces.
        makes: the results that it makes.
        needs: the results that it waits for.
        cost: the attribute of `pdjax.simulate.StageCost` that has its seconds.
        reads: which weights it reads under a `WeightRule`: those of forward or of backward passes,
            or none.
        stash: by how much it changes the number of microbatches whose stash its worker holds.
        pending: by how much it changes the number of microbatches whose weight gradients are
            pending on its worker.
    """

    letter: ActionKind
    name: str
    makes: tuple[Result, ...]
    needs: tuple[Need, ...]
    cost: str
    reads: Literal["forward", "backward"] | None = None
    stash: int = 0
    pending: int = 0


_ROWS = (
    Kind(
        "F",
        "forward",
        makes=("activations",),
        needs=(Need("activations", -1),),
        cost="forward_s",
        reads="forward",
        stash=1,
    ),
    Kind(
        "B",
        "backward",
        makes=("cotangents", "gradients"),
        needs=(Need("cotangents", 1), Need("activations")),
        cost="backward_s",
        reads="backward",
        stash=-1,
    ),
    Kind(
        "I",
        "input gradients",
        makes=("cotangents", "pending"),
        needs=(Need("cotangents", 1), Need("activations")),
        cost="input_part_s",
        reads="backward",
        stash=-1,
        pending=1,
    ),
    Kind(
        "W",
        "weight gradients",
        makes=("gradients",),
        needs=(Need("pending"),),
        cost="weight_part_s",
        reads="backward",
        pending=-1,
    ),
    Kind(
        "U",
        "update",
        makes=("weights",),
        needs=(Need("gradients", whole_round=True),),
        cost="update_s",
    ),
)
KINDS: dict[ActionKind, Kind] = {row.letter: row for row in _ROWS}
"""The kinds by letter."""

LETTERS = "".join(KINDS)
"""The letters of all kinds, in the order of the table."""

FORWARD: ActionKind = "F"
"""The kind with which a microbatch comes to a stage."""

BACKWARD: tuple[tuple[ActionKind, ...], ...] = (("B",), ("I", "W"))
"""The forms of going backward: in one pass, or in its parts; a microbatch has one of them."""


def makers_of(result: Result) -> tuple[ActionKind, ...]:
    """The kinds that make a result."""
    return tuple(letter for letter, row in KINDS.items() if result in row.makes)


def inputs_of(action: Action, num_stages: int) -> list[Action]:
    """The actions whose results an action needs, on whichever worker they are.

    Of several kinds that make a result the first one stands for all: ``B`` for an input part, too.
    An update has the last one of the gradients that it needs.
    """
    return [
        Action(makers_of(need.result)[0], action.stage + need.step, action.microbatch)
        for need in KINDS[action.kind].needs
        if 0 <= action.stage + need.step < num_stages
    ]
