"""A model cut into one stage for each layer, and the profile made from the costs of these stages.

Measuring (`pdjax.profile.measure`) and estimating (`pdjax.profile.roofline`) both cost each
distinct stage of this cut once:

    layers     embed │ block_0 │ block_1 │ block_2 │ head
    alike        0   │    1    │    1    │    1    │  2       position in `distinct`
    distinct     ●         ●                          ●       the costed stages: 0, 1, 4

Layers that share a changing state cannot be cut apart: they are one stage here, and share its
figures in proportion to their operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax

from pdjax.profile.profile import LayerProfile, Profile
from pdjax.split.differentiate import stage_inputs, stage_outputs
from pdjax.split.stages import Stage, StageSplit, split
from pdjax.split.state_placement import inseparable_by_state, inseparable_by_ties
from pdjax.trace import jaxprs
from pdjax.trace.layers import Layer, LayerGraph, model_fingerprint


@dataclass(frozen=True)
class FinestCut:
    """A model cut as finely as it may be.

    Attributes:
        split: the stages.
        layers: for each stage its layers.
        alike: for each stage which of `distinct` it is like.
        distinct: the stages that stand for all that are alike, by index.
    """

    split: StageSplit
    layers: tuple[tuple[Layer, ...], ...]
    alike: tuple[int, ...]
    distinct: tuple[int, ...]


def finest_cut(graph: LayerGraph) -> FinestCut:
    """Cuts `graph` at every layer at which it may be cut, and finds the stages that are alike."""
    count = len(graph.layers)
    inner = {at for a, b in inseparable_by_state(graph) for at in range(a + 1, b + 1)}
    starts = [at for at in range(count) if at not in inner]
    stages = split(graph, starts)
    layers = tuple(graph.layers[a:b] for a, b in pairwise([*starts, count]))
    numbers: dict[Any, int] = {}
    alike, distinct = [], []
    for stage, members in zip(stages.stages, layers, strict=True):
        number = numbers.setdefault(_likeness(stages, stage, members), len(numbers))
        if number == len(distinct):
            distinct.append(stage.index)
        alike.append(number)
    return FinestCut(stages, layers, tuple(alike), tuple(distinct))


def _likeness(stages: StageSplit, stage: Stage, layers: Sequence[Layer]) -> Any:
    """Equal for stages whose passes cost the same.

    The fingerprints compare the equations of the layers in full. Of the other equations of a stage
    (masks, dropout's random bits) the numbers are left out: they differ from layer to layer.
    """
    groups = {**stage_inputs(stages, stage), **stage_outputs(stages, stage)}
    return (
        tuple(layer.fingerprint for layer in layers),
        tuple(
            (equation.primitive.name, *map(_appearance, equation.outvars))
            for equation in stage.equations
        ),
        tuple((name, *map(_appearance, group)) for name, group in groups.items()),
        tuple(var in stages.active_values for var in (*stage.receives, *stage.sends)),
        0 in stage.outputs,
    )


def _appearance(atom: Any) -> tuple[Any, ...]:
    return jaxprs.aval(atom).shape, jaxprs.aval(atom).dtype


@dataclass(frozen=True)
class PassCosts:
    """The costs of the two passes of a stage; fields as in `LayerProfile`."""

    forward_s: float
    backward_s: float
    stash_bytes: float
    flops: float
    spread_s: float = 0.0


def assemble(
    graph: LayerGraph, cut: FinestCut, costs: Sequence[PassCosts], **about: Any
) -> Profile:
    """The profile of a model from the costs of the distinct stages of its finest cut.

    Args:
        graph: the model.
        cut: its finest cut.
        costs: the cost of each of ``cut.distinct``.
        about: the other fields of `Profile`: ``batch_size``, ``device`` and ``source``.
    """
    held = _held_bytes(cut)
    rows = [
        row
        for layers, number, size in zip(cut.layers, cut.alike, held, strict=True)
        for row in _rows(layers, costs[number], size)
    ]
    return Profile(
        tuple(rows),
        model=model_fingerprint(graph),
        jax_version=jax.__version__,
        dtype=_most_common_dtype(graph),
        inseparable=_several(inseparable_by_state(graph)),
        tied=_several(inseparable_by_ties(graph)),
        **about,
    )


def _rows(layers: Sequence[Layer], costs: PassCosts, held_bytes: int) -> list[LayerProfile]:
    """The layers of one stage, each with its share of the costs of the stage.

    Of the parameters that the stage holds, the bytes that no layer reads at full size count for
    the first layer.
    """
    unread = max(held_bytes - sum(layer.param_bytes for layer in layers), 0)
    return [
        LayerProfile(
            name=layer.name,
            cut_bytes=layer.cut_bytes,
            param_bytes=layer.param_bytes + (unread if at == 0 else 0),
            **{name: value * share for name, value in vars(costs).items()},
        )
        for at, (layer, share) in enumerate(zip(layers, _shares(layers), strict=True))
    ]


def _held_bytes(cut: FinestCut) -> list[int]:
    """For each stage the bytes of the parameters that it holds.

    More than its layers read at full size: also parameters of which only a smaller part, computed
    from parameters alone, reaches the loss, such as the first rows of a table of positions.
    """
    held = [0] * len(cut.split.stages)
    for var, homes in zip(cut.split.traced.params, cut.split.homes, strict=True):
        for stage in homes:
            held[stage] += jaxprs.num_bytes(var)
    return held


def _several(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The ranges of more than one layer, each once."""
    return tuple(sorted({(first, last) for first, last in ranges if first < last}))


def _shares(layers: Sequence[Layer]) -> list[float]:
    """Which part of their common figures falls to each of `layers`."""
    total = sum(layer.flops for layer in layers)
    return [layer.flops / total if total else 1 / len(layers) for layer in layers]


def _most_common_dtype(graph: LayerGraph) -> str:
    sizes: Counter[str] = Counter()
    for var in graph.traced.params:
        sizes[str(jaxprs.aval(var).dtype)] += jaxprs.num_bytes(var)
    return sizes.most_common(1)[0][0]
