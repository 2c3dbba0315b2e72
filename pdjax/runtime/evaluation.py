"""Forward-only runs through the stages, for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.sharding import Sharding

from pdjax import schedules
from pdjax.communication.transport import Transport
from pdjax.runtime.metrics import Results
from pdjax.runtime.microbatches import Intake, Slicing
from pdjax.runtime.stage import OutputIndex
from pdjax.split.differentiate import forward_only
from pdjax.split.stages import StageSplit
from pdjax.trace import jaxprs
from pdjax.trace.jaxprs import Var
from pdjax.trace.jit import Values, jit_on


class Evaluation:
    """The compiled forward passes of all stages for one shape of batch.

    It runs the schedule `pdjax.schedules.forward_only`.

    Args:
        split: the loss function, cut into stages.
        where: for each stage the place that runs it.
        placements: where the places are.
        consts: for each place the closed-over arrays that its stage reads.
        slicing: how a batch divides into microbatches.
        metric_axes: the axes along which metrics of microbatches are concatenated, or None.
        transport: how values travel.

    Attributes:
        split: the loss function, cut into stages.
        metrics_tree: the structure of the metrics, or None if there are none.
    """

    def __init__(
        self,
        split: StageSplit,
        where: Sequence[int],
        placements: Sequence[Sharding],
        consts: Sequence[Values],
        slicing: Slicing,
        metric_axes: Sequence[int | None],
        transport: Transport,
    ) -> None:
        self.split = split
        self.metrics_tree = split.traced.metrics_tree
        self._where = where
        self._here = [transport.here[at] for at in where]
        self._consts = consts
        self._slicing = slicing
        self._transport = transport
        self._order = schedules.dispatch_order(
            schedules.forward_only(len(split.stages), slicing.num_microbatches)
        )
        self._intakes = [Intake(placements[at], keeps_in_place=True) for at in where]
        self._indices, self._runs, self._picked = [], [], []
        for stage, at in zip(split.stages, where, strict=True):
            inputs, program = forward_only(split, stage)
            index = OutputIndex(program)
            order = [var for group in inputs.values() for var in group]
            read = set(program.reads)
            picked = tuple(at for at, var in enumerate(order) if var in read)

            def run(
                values: Values,
                names: Any = tuple(order[at] for at in picked),
                program: Any = program,
                index: Any = index,
            ) -> Values:
                return index.distinct(program.run(dict(zip(names, values, strict=True))))

            self._indices.append(index)
            self._runs.append(jit_on(run, placements[at]))
            self._picked.append(picked)
        self._results = Results(split, slicing.num_microbatches, metric_axes, placements[where[-1]])

    def run(
        self,
        weights: Sequence[Sequence[Any]],
        model: Sequence[Sequence[Any]],
        batch: Sequence[Any],
        keys: Sequence[Any],
    ) -> tuple[Any, Values]:
        """Dispatches the forward passes; returns the loss and the metrics' leaves.

        Args:
            weights: for each stage its parameter leaves.
            model: for each stage the leaves of the mutable state that it reads.
            batch: the batch leaves.
            keys: for each place the random key.
        """
        parts = [
            intake.take(batch, stage.batch, self._slicing) if here else []
            for stage, intake, here in zip(
                self.split.stages, self._intakes, self._here, strict=True
            )
        ]
        count = self._slicing.num_microbatches
        received: list[list[dict[Var, Any]]] = [[{} for _ in range(count)] for _ in self._where]
        results: list[dict[int, Any]] = [{} for _ in range(count)]
        for _, at, microbatch in self._order:
            stage, outputs = self.split.stages[at], None
            if self._here[at]:
                values = (
                    *weights[at],
                    *self._consts[self._where[at]],
                    *model[at],
                    *parts[at][microbatch],
                    *((keys[self._where[at]],) if stage.uses_key else ()),
                    *(received[at][microbatch].pop(var) for var in stage.receives),
                )
                outputs = self._runs[at](tuple(values[i] for i in self._picked[at]))
            self._send(at, outputs, [boxes[microbatch] for boxes in received])
            self._send_results(at, outputs, results[microbatch])
        return self._collect(results)

    def _send(self, at: int, outputs: Values | None, boxes: Sequence[dict[Var, Any]]) -> None:
        """Brings what a stage made to those that read it."""
        stage = self.split.stages[at]
        for later in sorted({target for targets in stage.targets for target in targets}):
            sent = [n for n, targets in enumerate(stage.targets) if later in targets]
            variables = [stage.sends[n] for n in sent]
            values = None
            if outputs is not None:
                values = [outputs[self._indices[at].sends[n]] for n in sent]
            shapes = list(map(jaxprs.shape_of, variables))
            moved = self._transport.move(values, shapes, self._where[at], self._where[later])
            if moved is not None:
                boxes[later].update(zip(variables, moved, strict=True))

    def _send_results(self, at: int, outputs: Values | None, results: dict[int, Any]) -> None:
        stage = self.split.stages[at]
        if not stage.outputs:
            return
        values = None
        if outputs is not None:
            values = [outputs[i] for i in self._indices[at].results]
        shapes = [jaxprs.shape_of(self.split.results[i]) for i in stage.outputs]
        moved = self._transport.move(values, shapes, self._where[at], self._where[-1])
        if moved is not None:
            results.update(zip(stage.outputs, moved, strict=True))

    def _collect(self, results: Sequence[dict[int, Any]]) -> tuple[Any, Values]:
        """The loss and the metrics of the batch, in every process."""
        made = self._results.of_minibatch(results) if self._here[-1] else None
        found = self._transport.broadcast(made, self._results.shapes, self._where[-1])
        return found[0], tuple(found[1 + self._results.weighted :])
