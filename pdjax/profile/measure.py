"""What the layers of a model cost, measured on a device or estimated from its rates.

The model is cut into one stage for each layer, and each of these is timed by itself:

    embed │ block_0/norm │ block_0/dense │ block_1/norm │ block_1/dense │ head
      ●         ●              ●            = block_0/norm …                ●

Layers that do the same to equal shapes are derived, compiled and timed once (●), so that a deep
model takes little longer than a shallow one of the same blocks. Layers that share a changing state
cannot be cut apart; they are timed together and share the figures in proportion to their
operations.

Stages are faster than the sum of their layers, as a compiler fuses what stands side by side, and
keep less, as they need not store what passes from one layer to the next. This does not matter to
where the cuts should fall as long as it is true of all layers alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from os import cpu_count
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pdjax.profile.profile import LayerProfile, Profile, check_batch_size
from pdjax.profile.rates import Rates
from pdjax.profile.timing import Pass, dispatch_s, make_inputs, sample, saved_values
from pdjax.split.differentiate import (
    StagePrograms,
    differentiate_alone,
    stage_inputs,
    stage_outputs,
)
from pdjax.split.stages import Stage, StageSplit, split
from pdjax.split.state_placement import inseparable_by_state, inseparable_by_ties
from pdjax.trace import jaxprs
from pdjax.trace.flops import equation_flops
from pdjax.trace.jaxprs import Equation, Var
from pdjax.trace.layers import Layer, LayerGraph, model_fingerprint
from pdjax.trace.program import Program

Report = Callable[[str, int, int], None]
"""Is told what is being done, how many steps are done, and of how many."""

_LOOKUPS = frozenset({"gather", "dynamic_slice"})


def measure(
    graph: LayerGraph,
    *,
    batch_size: int,
    device: Any = None,
    batch: Any = None,
    repeats: int = 7,
    progress: bool | Report = False,
) -> Profile:
    """Times the layers of a model on a device.

    Weights and activations are made up: small random numbers, and zeros for what is not real. The
    model's parameters are not needed, only their shapes.

    Args:
        graph: the model, traced for one microbatch.
        batch_size: examples in that microbatch.
        device: a device, or a sharding of one; the first local device if not given.
        batch: a microbatch of the shapes that `graph` was traced with. With its tokens and labels
            an embedding is timed as in training; zeros all look up the same row.
        repeats: how many samples are taken of each pass; the profile has their medians.
        progress: whether to show a bar, which appears on a terminal only; or a function to call.

    Raises:
        ValueError: if an argument makes no sense.
        RuntimeError: if a layer does not run, for lack of memory for example; the text names it.
    """
    check_batch_size(batch_size)
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; expected at least 1.")
    placement = _placement(device)
    cut = _cut(graph)
    leaves = _check_batch(graph, batch)
    with _reporting(progress, 2 * len(cut.distinct) + 1) as report:
        timers = [_Timer(graph, cut, unit, placement, leaves) for unit in cut.distinct]
        _compile(timers, report)
        report("dispatch", len(timers), 2 * len(timers) + 1)
        idle_s = _inline_dispatch_s(placement, repeats)
        costs = []
        for done, timer in enumerate(timers, len(timers) + 1):
            report(timer.name, done, 2 * len(timers) + 1)
            costs.append(timer.run(repeats, idle_s))
        report("done", 2 * len(timers) + 1, 2 * len(timers) + 1)
    kind = _device_kind(placement)
    return _profile(graph, cut, costs, batch_size=batch_size, device=kind, source="measured")


def estimate(graph: LayerGraph, rates: Rates, *, batch_size: int) -> Profile:
    """What the layers of a model would cost on a device of given rates; nothing is run.

    Each pass takes as long as its operations, or as reading its inputs and writing its outputs,
    whichever is longer: ``max(flops / flops_per_s, bytes / bytes_per_s)``. Both passes are counted
    equation by equation, so a backward pass comes to about twice its forward pass where it makes
    gradients of weights and activations, and to less where it makes one of them.

    Args:
        graph: the model, traced for one microbatch; its parameters may be shapes.
        rates: what the device does in a second.
        batch_size: examples in that microbatch.

    Raises:
        ValueError: if `batch_size` makes no sense.
    """
    check_batch_size(batch_size)
    cut = _cut(graph)
    costs = []
    for unit in cut.distinct:
        programs = differentiate_alone(cut.split, cut.split.stages[unit])
        costs.append(
            _Cost(
                forward_s=_roofline_s(programs.forward, rates),
                backward_s=_roofline_s(programs.backward, rates),
                stash_bytes=programs.saved_bytes,
                flops=sum(map(equation_flops, programs.forward.equations)),
            )
        )
    return _profile(graph, cut, costs, batch_size=batch_size, device=rates.name, source="analytic")


def check_profile(
    profile: Profile, graph: LayerGraph, *, batch_size: int, device: Any = None
) -> Profile:
    """A profile that is fit for a model, a batch size and a device.

    Args:
        profile: any profile.
        graph: the model.
        batch_size: examples in a microbatch; the profile is rescaled to it with a warning.
        device: a device, or a sharding of one; if given, the profile must be for its kind (or, if
            analytic, for rates whose name is part of it). A profile that names none passes.

    Raises:
        ValueError: if the profile is for another model or device, or for no batch size that is
            known.
    """
    if profile.names != graph.names:
        differing = sorted(set(profile.names) ^ set(graph.names))
        raise ValueError(
            f"the profile is of another model: it has {len(profile.names)} layers, this model "
            f"{len(graph.names)}; differing: {differing[:6]}. Profile this model."
        )
    found, expected = profile.model, model_fingerprint(graph)
    if found and found != expected:
        raise ValueError(
            f"the profile is of another model: its fingerprint is {found}, that of this model "
            f"{expected}. The layers have the same names, but other parameters or sizes. "
            "Profile this model."
        )
    if device is not None and profile.device:
        _check_device(profile, _device_kind(_placement(device)))
    return profile.rescaled(batch_size)


def _check_device(profile: Profile, kind: str) -> None:
    part = profile.device.partition("-")[0]  # "a100-bf16" is for an a100
    fits = part.lower() in kind.lower() if profile.source == "analytic" else profile.device == kind
    if not fits:
        raise ValueError(
            f"the profile is for a device of the kind {profile.device!r}, and this one is of the "
            f"kind {kind!r}: layers that are slow on one may be fast on the other. Measure on "
            "this one. To use the profile all the same, say that its device is unknown: "
            "dataclasses.replace(profile, device='')."
        )


def _placement(device: Any) -> Sharding:
    if isinstance(device, Sharding):
        return device
    return SingleDeviceSharding(jax.local_devices()[0] if device is None else device)


def _device_kind(placement: Sharding) -> str:
    return min(placement.device_set, key=lambda device: device.id).device_kind


def _check_batch(graph: LayerGraph, batch: Any) -> Sequence[Any] | None:
    if batch is None:
        return None
    leaves = jax.tree.leaves(batch)
    got = [(np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype)) for leaf in leaves]
    shapes = map(jaxprs.shape_of, graph.traced.batch)
    expected = [(shape.shape, shape.dtype) for shape in shapes]
    if got != expected:
        raise ValueError(
            f"the batch has leaves {got}, but the model was traced for a microbatch of {expected}."
        )
    return leaves


# ---------------------------------------------------------------- one stage for each layer


@dataclass(frozen=True)
class _Cut:
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


def _cut(graph: LayerGraph) -> _Cut:
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
    return _Cut(stages, layers, tuple(alike), tuple(distinct))


def _likeness(stages: StageSplit, stage: Stage, layers: Sequence[Layer]) -> Any:
    """Equal for stages whose passes cost the same.

    The fingerprints compare what stands in the layers in full. Of what a stage repeats besides
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
class _Cost:
    """What a stage costs; fields as in `LayerProfile`."""

    forward_s: float
    backward_s: float
    stash_bytes: float
    flops: float
    spread_s: float = 0.0


def _profile(graph: LayerGraph, cut: _Cut, costs: Sequence[_Cost], **about: Any) -> Profile:
    rows = []
    held = _held_bytes(cut)
    for layers, number, extra in zip(cut.layers, cut.alike, held, strict=True):
        extra -= sum(layer.param_bytes for layer in layers)
        for layer, share in zip(layers, _shares(layers), strict=True):
            cost = {name: value * share for name, value in vars(costs[number]).items()}
            rows.append(
                LayerProfile(
                    name=layer.name,
                    cut_bytes=layer.cut_bytes,
                    param_bytes=layer.param_bytes + max(extra, 0),
                    **cost,
                )
            )
            extra = 0
    return Profile(
        tuple(rows),
        model=model_fingerprint(graph),
        jax_version=jax.__version__,
        dtype=_most_common_dtype(graph),
        inseparable=_several(inseparable_by_state(graph)),
        tied=_several(inseparable_by_ties(graph)),
        **about,
    )


def _held_bytes(cut: _Cut) -> list[int]:
    """For each stage the bytes of the parameters that it holds.

    More than its layers read at full size: also what reaches the loss by way of something smaller
    that is made of parameters alone, such as the first rows of a table of positions.
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


# ---------------------------------------------------------------- measuring


class _Timer:
    """The passes of one stage, to be compiled and timed."""

    def __init__(
        self,
        graph: LayerGraph,
        cut: _Cut,
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

    def run(self, repeats: int, idle_s: float) -> _Cost:
        """Times both passes; `idle_s` is subtracted from each call."""
        with _naming(self.name):
            seconds = self._sample(repeats)
        forward_s, backward_s = np.maximum(np.median(seconds, axis=0) - idle_s, 0.0).tolist()
        low, high = np.quantile(seconds.sum(axis=1), (0.25, 0.75))
        return _Cost(
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


def _compile(timers: Sequence[_Timer], report: Report) -> None:
    with ThreadPoolExecutor(max_workers=cpu_count()) as pool:
        waiting = [
            (timer.name, [pool.submit(one.compile) for one in (timer.forward, timer.backward)])
            for timer in timers
        ]
        for done, (name, passes) in enumerate(waiting):
            report(name, done, 2 * len(timers) + 1)
            with _naming(name):
                for compiled in passes:
                    compiled.result()


def _inline_dispatch_s(placement: Sharding, repeats: int) -> float:
    """The part of each call that a stage pays once however many layers it has.

    On a CPU the host is the device, so that a small program's time is that of the dispatch and that
    of the work. An accelerator works while the host dispatches: nothing adds up there.
    """
    device = min(placement.device_set, key=lambda device: device.id)
    return dispatch_s(placement, repeats) if device.platform == "cpu" else 0.0


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Says of which layer an error of JAX is."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"layer {layer!r} could not be measured: {reason} If it lacks memory, use a smaller "
            "microbatch, or an analytic profile (pdjax.profile.measure.estimate)."
        ) from error


@contextmanager
def _reporting(progress: bool | Report, steps: int) -> Iterator[Report]:
    """A function that reports progress, to the caller's or to a bar on a terminal."""
    if callable(progress):
        yield progress
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("profiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    hidden = not (progress and console.is_terminal)
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("", total=steps)
        yield lambda what, done, _: bar.update(task, completed=done, description=what)


# ---------------------------------------------------------------- estimating


def _roofline_s(program: Program, rates: Rates) -> float:
    flops = sum(map(equation_flops, program.equations))
    return max(flops / rates.flops_per_s, _moved_bytes(program) / rates.bytes_per_s)


def _moved_bytes(program: Program) -> float:
    """Bytes that a pass must read and write if all between its inputs and outputs is fused."""
    made = jaxprs.variables(atom for group in program.outputs.values() for atom in group)
    readers: dict[Var, list[Equation]] = {var: [] for var in program.reads}
    for equation in program.equations:
        for var in jaxprs.variables(equation.invars):
            if var in readers:
                readers[var].append(equation)
    return sum(map(jaxprs.num_bytes, made)) + sum(
        _read_bytes(var, equations) for var, equations in readers.items()
    )


def _read_bytes(var: Var, readers: Sequence[Equation]) -> int:
    """Bytes that are read of an input: of a table from which rows are looked up, these rows."""
    if not readers or any(
        equation.primitive.name not in _LOOKUPS or equation.invars[0] is not var
        for equation in readers
    ):
        return jaxprs.num_bytes(var)
    rows = sum(jaxprs.num_bytes(equation.outvars[0]) for equation in readers)
    return min(rows, jaxprs.num_bytes(var))
