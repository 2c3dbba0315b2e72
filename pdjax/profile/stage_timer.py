"""The passes of one stage, compiled and timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from pdjax.profile.finest_cut import FinestCut, PassCosts
from pdjax.profile.timing import Pass, make_inputs, sample, saved_values
from pdjax.split.differentiate import StagePrograms, differentiate_alone
from pdjax.trace.jaxprs import Var
from pdjax.trace.layers import LayerGraph


class StageTimer:
    """The passes of one stage, to be compiled and timed."""

    def __init__(
        self,
        graph: LayerGraph,
        cut: FinestCut,
        unit: int,
        placement: Sharding,
        batch: Sequence[Any] | None,
    ) -> None:
        stage = cut.split.stages[unit]
        self.name = cut.layers[unit][0].name
        self._flops = sum(layer.flops for layer in cut.layers[unit])
        self._placement = placement
        self._programs = differentiate_alone(cut.split, stage)
        self._known = _known_inputs(graph, self._programs, batch)
        self.forward = Pass(self._programs.forward, placement)
        self.backward = Pass(self._programs.backward, placement)

    def run(self, repeats: int, idle_s: float) -> PassCosts:
        """Times both passes; `idle_s` is subtracted from each call."""
        with naming(self.name):
            seconds = self._sample(repeats)
        forward_s, backward_s = np.maximum(np.median(seconds, axis=0) - idle_s, 0.0).tolist()
        low, high = np.quantile(seconds.sum(axis=1), (0.25, 0.75))
        return PassCosts(
            forward_s=forward_s,
            backward_s=backward_s,
            stash_bytes=self._programs.saved_bytes,
            # XLA counts the body of a loop once, and a call of a library as nothing
            flops=max(self.forward.flops, self._flops),
            spread_s=float(high - low) / 2,
        )

    def _sample(self, repeats: int) -> np.ndarray:
        reads = {*self.forward.reads, *self.backward.reads}
        values = make_inputs(self._programs, reads, self._known, self._placement)
        forward = self.forward.bind(values)
        saved = self._programs.forward.outputs["saved"]
        values |= saved_values(self.forward, tuple(forward()), saved)
        return sample([forward, self.backward.bind(values)], repeats)


def _known_inputs(
    graph: LayerGraph, programs: StagePrograms, batch: Sequence[Any] | None
) -> dict[Var, Any]:
    """The inputs of a stage whose values need not be made up."""
    stage, consts = programs.stage, graph.traced.program.consts
    known = {var: consts[i] for var, i in zip(programs.inputs["consts"], stage.consts, strict=True)}
    if batch is not None:
        known |= zip(programs.inputs["batch"], (batch[i] for i in stage.batch), strict=True)
    return known


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Says of which layer an error of JAX is."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"layer {layer!r} could not be measured: {reason} If it lacks memory, use a smaller "
            "microbatch, or an analytic profile (pdjax.profile.roofline.estimate)."
        ) from error
