"""The costs of the layers of a model, measured on a device.

The model is cut into one stage for each layer, and each of these is timed by itself:

    embed │ block_0/norm │ block_0/dense │ block_1/norm │ block_1/dense │ head
      ●         ●              ●            = block_0/norm …                ●

Layers that do the same to equal shapes are derived, compiled and timed once (●), so that a deep
model takes little longer than a shallow one of the same blocks. Layers that share a changing state
cannot be cut apart; they are timed together and share the figures in proportion to their
operations.

Stages are faster than the sum of their layers, as a compiler fuses neighbouring operations, and
keep less, as they need not store the values between two of their layers. This does not matter to
where the cuts should fall as long as it is true of all layers alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from pdjax.profile.device import device_kind, first_device, placement_of
from pdjax.profile.finest_cut import assemble, finest_cut
from pdjax.profile.profile import Profile, check_batch_size
from pdjax.profile.progress import Report, reporting
from pdjax.profile.stage_timer import StageTimer, naming
from pdjax.profile.timing import dispatch_s
from pdjax.trace import jaxprs
from pdjax.trace.layers import LayerGraph


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

    Weights and activations are made up: small random numbers, and zeros where the type is not real.
    The model's parameters are not needed, only their shapes.

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
    placement = placement_of(device)
    cut = finest_cut(graph)
    leaves = _check_batch(graph, batch)
    with reporting(progress, 2 * len(cut.distinct) + 1) as report:
        timers = [StageTimer(graph, cut, unit, placement, leaves) for unit in cut.distinct]
        _compile(timers, report)
        report("dispatch", len(timers), 2 * len(timers) + 1)
        idle_s = _inline_dispatch_s(placement, repeats)
        costs = []
        for done, timer in enumerate(timers, len(timers) + 1):
            report(timer.name, done, 2 * len(timers) + 1)
            costs.append(timer.run(repeats, idle_s))
        report("done", 2 * len(timers) + 1, 2 * len(timers) + 1)
    kind = device_kind(placement)
    return assemble(graph, cut, costs, batch_size=batch_size, device=kind, source="measured")


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


def _compile(timers: Sequence[StageTimer], report: Report) -> None:
    with ThreadPoolExecutor(max_workers=cpu_count()) as pool:
        waiting = [
            (timer.name, [pool.submit(one.compile) for one in (timer.forward, timer.backward)])
            for timer in timers
        ]
        for done, (name, passes) in enumerate(waiting):
            report(name, done, 2 * len(timers) + 1)
            with naming(name):
                for compiled in passes:
                    compiled.result()


def _inline_dispatch_s(placement: Sharding, repeats: int) -> float:
    """The part of each call that a stage pays once however many layers it has.

    On a CPU the host is the device, so that a small program's time is that of the dispatch and that
    of the work. An accelerator works while the host dispatches: nothing adds up there.
    """
    works_on_host = first_device(placement).platform == "cpu"
    return dispatch_s(placement, repeats) if works_on_host else 0.0
