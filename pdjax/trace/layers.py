"""From equations to a line of layers.

The LINE equations of a traced loss, in program order, are *the line*: the part that a pipeline
cuts. `build_graph` groups them into layers, each a contiguous run of one module:

    embed │ block_0/LayerNorm_0 │ block_0/Dense_0 │ … │ head
          ↑                     ↑                 a cut may fall at any bar

Linen writes the module path on every equation. NNX and plain functions do not: there an equation
is named after the module of the parameters that it reads, and equations without parameters join
the layer before them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from pdjax.errors import PdjaxWarning
from pdjax.trace import jaxprs
from pdjax.trace.dataflow import DataFlow
from pdjax.trace.flops import equation_flops
from pdjax.trace.jaxprs import Equation, Var
from pdjax.trace.loss_fn import TracedLoss, ValueKind, trace_loss


@dataclass(frozen=True)
class Layer:
    """The smallest unit that may be placed: a run of equations of one module.

    Attributes:
        name: module path, such as ``"block_0/Dense_1"``; a second run of the same module ends
            in ``#2``.
        start: position of its first equation on the line.
        stop: position after its last one.
        params: paths of the parameters that it reads.
        param_bytes: their bytes.
        flops: estimated operations of a forward pass over one microbatch.
        cut_bytes: bytes of one microbatch that cross a cut placed right after this layer: every
            value made before it and used after it, once.
        fingerprint: equal for layers that do the same to equal shapes.
    """

    name: str
    start: int
    stop: int
    params: tuple[str, ...]
    param_bytes: int
    flops: float
    cut_bytes: int
    fingerprint: str


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """A traced loss function as a line of layers.

    Attributes:
        traced: the equations.
        line: positions in the program of the equations on the line.
        layers: the layers, which cover the line in order.
    """

    traced: TracedLoss = field(repr=False)
    line: tuple[int, ...] = field(repr=False)
    layers: tuple[Layer, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers, in order."""
        return tuple(layer.name for layer in self.layers)

    def to_json(self) -> str:
        """The layers as JSON, without the equations."""
        return json.dumps([asdict(layer) for layer in self.layers], indent=1)


def build_graph(
    loss_fn: Callable[..., Any],
    params: Any,
    batch: Any,
    rng: Any,
    *,
    model_state: Any = None,
    weighted_loss: bool = False,
) -> LayerGraph:
    """Traces `loss_fn` on one microbatch and finds its layers (arguments as in `trace_loss`)."""
    traced = trace_loss(
        loss_fn, params, batch, rng, model_state=model_state, weighted_loss=weighted_loss
    )
    line = [
        position
        for position, equation in enumerate(traced.equations)
        if _is_on_line(traced, equation)
    ]
    reads = [traced.wide_params(traced.equations[position].invars) for position in line]
    runs = _merge_runs(_find_runs(traced, line, reads))
    _warn_of_loops(traced, line)
    return LayerGraph(traced, tuple(line), _describe(traced, line, reads, runs))


def model_fingerprint(graph: LayerGraph) -> str:
    """A digest of the structure of a model: its layers' names, its parameters and their bytes.

    It does not depend on the batch size, the device or the version of JAX.
    """
    traced = graph.traced
    sizes = zip(traced.param_names, map(jaxprs.num_bytes, traced.params), strict=True)
    layers = [[layer.name, layer.params] for layer in graph.layers]
    text = json.dumps([layers, sorted(sizes)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_on_line(traced: TracedLoss, equation: Equation) -> bool:
    if jaxprs.has_effects(equation):
        return True
    return any(traced.kind(var) is ValueKind.LINE for var in equation.outvars)


# ---------------------------------------------------------------- finding the runs


@dataclass
class _LayerRun:
    """Consecutive equations of the line under one label; `owns` says if they read parameters."""

    label: str
    start: int
    owns: bool


def _find_runs(
    traced: TracedLoss, line: Sequence[int], reads: Sequence[frozenset[Var]]
) -> list[_LayerRun]:
    scopes = _without_root([traced.program.paths[position] for position in line])
    name_of = dict(zip(traced.params, traced.param_names, strict=True))
    runs: list[_LayerRun] = []
    for at, (scope, params) in enumerate(zip(scopes, reads, strict=True)):
        label = _label(scope, [name_of[var] for var in traced.params if var in params])
        if not runs or (label and label != runs[-1].label):
            runs.append(_LayerRun(label, at, bool(params)))
        else:
            runs[-1].owns |= bool(params)
    return runs


def _label(scope: str, params: list[str]) -> str:
    """The module that an equation belongs to; "" if it is unknown."""
    if not params:
        return scope
    module = _common_module(params)
    return module if not scope or _is_inside(scope, module) else scope


def _is_inside(scope: str, module: str) -> bool:
    return f"{scope}/".startswith(f"{module}/")


def _common_module(params: list[str]) -> str:
    """The deepest module that holds all of `params`; a lone top-level leaf is its own module."""
    modules = [name.rpartition("/")[0].split("/") if "/" in name else [name] for name in params]
    shared = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "/".join(shared) or params[0]


def _without_root(scopes: list[str]) -> list[str]:
    """Drops the root module's name, which every scope of a Linen model begins with."""
    roots = {scope.partition("/")[0] for scope in scopes if scope}
    if len(roots) != 1:
        return scopes
    return [scope.partition("/")[2] for scope in scopes]


def _merge_runs(runs: list[_LayerRun]) -> list[_LayerRun]:
    """Joins runs without parameters to the run before them, and equal neighbours."""
    merged: list[_LayerRun] = []
    for run in runs:
        if merged and (not run.owns or run.label == merged[-1].label):
            continue
        if merged and not merged[0].owns:
            merged = []
        start = run.start if merged else 0
        merged.append(_LayerRun(run.label or "loss", start, run.owns))
    return merged


# ---------------------------------------------------------------- describing the layers


def _describe(
    traced: TracedLoss,
    line: Sequence[int],
    reads: Sequence[frozenset[Var]],
    runs: Sequence[_LayerRun],
) -> tuple[Layer, ...]:
    crossing = _crossing_bytes(traced, line)
    names = _unique([run.label for run in runs])
    bounds = [*(run.start for run in runs), len(line)]
    layers = []
    for name, (start, stop) in zip(names, pairwise(bounds), strict=True):
        equations = [traced.equations[position] for position in line[start:stop]]
        used = frozenset().union(*reads[start:stop])
        params = [var for var in traced.params if var in used]
        layers.append(
            Layer(
                name=name,
                start=start,
                stop=stop,
                params=tuple(traced.param_names[traced.params.index(var)] for var in params),
                param_bytes=sum(map(jaxprs.num_bytes, params)),
                flops=sum(map(equation_flops, equations)),
                cut_bytes=crossing[stop],
                fingerprint=jaxprs.fingerprint(equations),
            )
        )
    return tuple(layers)


def _unique(labels: list[str]) -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for label in labels:
        seen[label] += 1
        names.append(label if seen[label] == 1 else f"{label}#{seen[label]}")
    return names


def _crossing_bytes(traced: TracedLoss, line: Sequence[int]) -> list[int]:
    """For each position of the line, the bytes made before it and read at or after it."""
    flow = DataFlow([traced.equations[position] for position in line])
    steps = [0] * (len(line) + 2)
    for var, made_at in flow.makers.items():
        if var in flow.readers:
            steps[made_at + 1] += jaxprs.num_bytes(var)
            steps[flow.readers[var][-1] + 1] -= jaxprs.num_bytes(var)
    return list(accumulate(steps))


def _warn_of_loops(traced: TracedLoss, line: Sequence[int]) -> None:
    """Warns of each loop that takes its weights layer by layer from a stack."""
    for position in line:
        equation = traced.equations[position]
        length = equation.params.get("length", 1)
        if equation.primitive.name != "scan" or length == 1:
            continue
        stacked = traced.wide_params(equation.invars[sum(jaxprs.scan_layout(equation)) :])
        names = [
            name
            for var, name in zip(traced.params, traced.param_names, strict=True)
            if var in stacked
        ]
        if names:
            warnings.warn(
                f"{_common_module(names)!r} is a lax.scan over {length} layers, which pdjax places "
                "as one unit: no cut can fall inside it. Write the layers out (a Python loop "
                "instead of nn.scan) to let them be spread over stages.",
                PdjaxWarning,
                stacklevel=3,
            )
