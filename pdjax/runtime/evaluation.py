"""Forward-only runs through the stages, for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Sharding

from pdjax import jaxprs
from pdjax.differentiate import forward_only
from pdjax.jaxprs import Var
from pdjax.runtime.placed import Values, placed
from pdjax.runtime.results import Merge, mean_of_results
from pdjax.runtime.stage import OutputIndex
from pdjax.split import StageSplit


class Evaluation:
    """The compiled forward passes of all stages for one shape of batch.

    Attributes:
        metrics_tree: the structure of the metrics, or None if there are none.
    """

    def __init__(
        self,
        split: StageSplit,
        placements: Sequence[Sharding],
        consts: tuple[Values, ...],
    ) -> None:
        self._split = split
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
        merges: list[Merge] = ["same"] * len(split.traced.metrics)
        self._combine = mean_of_results(1, weighted, merges, placements[-1])

    def run(
        self,
        weights: Mapping[int, Any],
        model: Mapping[int, Any],
        batch: Sequence[Any],
        key: Any,
    ) -> tuple[Any, Values]:
        """Dispatches the stages one after the other; returns the loss and the metrics' leaves.

        Args:
            weights: each parameter leaf by index, wherever it is.
            model: each leaf of the mutable state by index.
            batch: the batch leaves.
            key: the random key.
        """
        made: dict[Var, Any] = {}
        results: dict[int, Any] = {
            at: jnp.asarray(atom.val, jaxprs.aval(atom).dtype)
            for at, atom in enumerate(self._split.results)
            if not isinstance(atom, Var)
        }
        columns = (self._split.stages, self._runs, self._indices, self._picked)
        for stage, run, index, picked in zip(*columns, strict=True):
            values = (
                *(weights[i] for i in stage.params),
                *self._consts[stage.index],
                *(model[i] for i in stage.state),
                *(batch[i] for i in stage.batch),
                *((key,) if stage.uses_key else ()),
                *(made[var] for var in stage.receives),
            )
            outputs = run(tuple(values[at] for at in picked))
            made |= zip(stage.sends, (outputs[at] for at in index.sends), strict=True)
            results |= zip(stage.outputs, (outputs[at] for at in index.results), strict=True)
        loss, _, metrics = self._combine([tuple(results[at] for at in sorted(results))])
        return loss, metrics
