"""Forward-only runs through the stages, for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Sharding

from pdjax import jaxprs, schedules
from pdjax.differentiate import forward_only
from pdjax.jaxprs import Var
from pdjax.runtime.intake import Intake, Slicing
from pdjax.runtime.placed import Values, placed
from pdjax.runtime.results import Merge, mean_of_results
from pdjax.runtime.stage import OutputIndex
from pdjax.split import StageSplit


class Evaluation:
    """The compiled forward passes of all stages for one shape of batch.

    It runs the schedule `pdjax.schedules.forward_only`.

    Args:
        split: the loss function, cut into stages.
        placements: where the stages are.
        consts: for each stage the closed-over arrays that it reads, in place.
        slicing: how a batch divides into microbatches.
        metric_axes: the axes along which metrics of microbatches are concatenated, or None.

    Attributes:
        metrics_tree: the structure of the metrics, or None if there are none.
    """

    def __init__(
        self,
        split: StageSplit,
        placements: Sequence[Sharding],
        consts: tuple[Values, ...],
        slicing: Slicing,
        metric_axes: Sequence[int | None],
    ) -> None:
        self._split = split
        self._slicing = slicing
        self._order = schedules.dispatch_order(
            schedules.forward_only(len(split.stages), slicing.num_microbatches)
        )
        self._intakes = [Intake(placement, keeps_in_place=True) for placement in placements]
        self.metrics_tree = split.traced.metrics_tree
        self._runs, self._indices, self._picked = [], [], []
        for stage, placement in zip(split.stages, placements, strict=True):
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

            self._runs.append(placed(run, placement))
            self._indices.append(index)
            self._picked.append(picked)
        self._consts = consts
        weighted = split.traced.weight is not None
        merges: list[Merge] = ["combine" if axis is None else axis for axis in metric_axes]
        self._constants = {
            at: jnp.asarray(atom.val, jaxprs.aval(atom).dtype)
            for at, atom in enumerate(split.results)
            if not isinstance(atom, Var)
        }
        for at in self._constants:  # the first result, the loss, is none
            if at > weighted:
                merges[at - 1 - weighted] = "same"
        count = slicing.num_microbatches
        self._combine = mean_of_results(count, weighted, merges, placements[-1])

    def run(
        self,
        weights: Mapping[int, Any],
        model: Mapping[int, Any],
        batch: Sequence[Any],
        key: Any,
    ) -> tuple[Any, Values]:
        """Dispatches the forward passes; returns the loss and the metrics' leaves.

        Args:
            weights: each parameter leaf by index, wherever it is.
            model: each leaf of the mutable state by index.
            batch: the batch leaves.
            key: the random key.
        """
        parts = [
            intake.take(batch, stage.batch, self._slicing)
            for stage, intake in zip(self._split.stages, self._intakes, strict=True)
        ]
        count = self._slicing.num_microbatches
        made: list[dict[Var, Any]] = [{} for _ in range(count)]
        results: list[dict[int, Any]] = [dict(self._constants) for _ in range(count)]
        for _, at, microbatch in self._order:
            stage, index, sent = self._split.stages[at], self._indices[at], made[microbatch]
            values = (
                *(weights[i] for i in stage.params),
                *self._consts[at],
                *(model[i] for i in stage.state),
                *parts[at][microbatch],
                *((key,) if stage.uses_key else ()),
                *(sent[var] for var in stage.receives),
            )
            outputs = self._runs[at](tuple(values[i] for i in self._picked[at]))
            sent |= zip(stage.sends, (outputs[i] for i in index.sends), strict=True)
            found = zip(stage.outputs, (outputs[i] for i in index.results), strict=True)
            results[microbatch] |= found
        loss, _, metrics = self._combine([tuple(r[at] for at in sorted(r)) for r in results])
        return loss, metrics
