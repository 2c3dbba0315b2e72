"""The equations, inputs and transfers that give every stage the values that it needs.

The loss function (`pdjax.split.stages`) and the optimizer's update (`pdjax.split.optimizer`) are
cut into stages by the same walk backward from the needed values. They differ in the rule that says
which stage computes a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pdjax.trace.dataflow import DataFlow
from pdjax.trace.jaxprs import Var

Demand = tuple[Var, int]
"""A value, and a stage that must have it."""


@dataclass(eq=False)
class Transfer:
    """A value that travels: the stage that computes it, and the stages that receive it."""

    source: int
    targets: set[int] = field(default_factory=set)


class Supply:
    """The work of the stages for all demands so far.

    `add` works through a list of demands. Of each demand (value, stage), once:

    1. `source` names the stage that computes the value for this stage.
    2. If it is another stage, the value is sent from there, and that stage must have it.
    3. If it is this stage and an equation makes the value, the equation runs here, and the stage
       must have the inputs of the equation.
    4. If it is this stage and no equation makes the value, it is an input of the stage.

    Three stages, the values a, b, c made on the stages 0, 1, 2, and c = f(a, b), b = g(a):

        add((c, 2))    c is made here: f runs on 2, which must have a and b
        (b, 2)         b is made on 1: b is sent 1 → 2, and stage 1 must have it
        (b, 1)         g runs on 1, which must have a
        (a, 1), (a, 2) a is made on 0: a is sent 0 → 1 and 0 → 2; its equation runs on 0

    Attributes:
        run: for each stage the positions of the equations that it runs.
        inputs: for each stage the inputs of the program that it reads.
        transfers: the values that travel, in the order in which they were first sent.
    """

    def __init__(self, flow: DataFlow, num_stages: int, source: Callable[[Var, int], int]) -> None:
        self._flow = flow
        self._source = source
        self._done: set[Demand] = set()
        self.run: list[set[int]] = [set() for _ in range(num_stages)]
        self.inputs: list[set[Var]] = [set() for _ in range(num_stages)]
        self.transfers: dict[Var, Transfer] = {}

    def add(self, demands: Iterable[Demand]) -> None:
        """Sees to `demands`, and to all that follow from them."""
        pending = list(demands)
        while pending:
            demand = pending.pop()
            if demand not in self._done:
                self._done.add(demand)
                pending += self._meet(*demand)

    def _meet(self, var: Var, stage: int) -> list[Demand]:
        """Records a demand; returns the demands that follow from it."""
        source = self._source(var, stage)
        if source != stage:
            self.transfers.setdefault(var, Transfer(source)).targets.add(stage)
            return [(var, source)]
        position = self._flow.makers.get(var)
        if position is None:
            self.inputs[stage].add(var)
            return []
        self.run[stage].add(position)
        return [(read, stage) for read in self._flow.inputs[position]]
