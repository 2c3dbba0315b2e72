"""The profile of a model: a given one, one from before, or a measured one."""

from __future__ import annotations

import logging
from typing import Any

import jax

from pdjax.cache import cached, kind_of_device
from pdjax.profile.measure import check_profile, measure
from pdjax.profile.profile import FORMAT, Profile
from pdjax.split.state_placement import inseparable_by_state, inseparable_by_ties
from pdjax.trace import jaxprs
from pdjax.trace.layers import LayerGraph, model_fingerprint

_log = logging.getLogger("pdjax")


def find_profile(
    given: Profile | None, graph: LayerGraph, device: Any, batch_size: int, batch: Any
) -> Profile:
    """The model's profile: the given one, made fit for these microbatches, or a measured one.

    Args:
        given: a profile; None if there is none.
        graph: the model, traced for one microbatch.
        device: where to measure, or what the profile must be for.
        batch_size: examples in a microbatch.
        batch: a microbatch, for the measurement; None to make one up.

    Raises:
        ValueError: if the profile is for another model or device, or for no batch size that is
            known.
    """
    if given is None:
        return measured_profile(graph, device, batch_size, batch)
    return check_profile(given, graph, batch_size=batch_size, device=device)


def measured_profile(graph: LayerGraph, device: Any, batch_size: int, batch: Any) -> Profile:
    """The model's profile, from before if there is one for the same model on such a device.

    Args:
        graph: the model, traced for one microbatch.
        device: where to measure; a local device in the place of one of another process.
        batch_size: examples in a microbatch.
        batch: a microbatch, for the measurement; None to make one up.
    """
    traced = graph.traced
    if device.process_index != jax.process_index():
        device = jax.local_devices()[0]
    about = (
        "profile",
        FORMAT,
        model_fingerprint(graph),
        [(x.name, x.fingerprint, x.cut_bytes, x.param_bytes, x.params) for x in graph.layers],
        [str(jaxprs.aval(var)) for var in (*traced.params, *traced.state, *traced.batch)],
        [inseparable_by_state(graph), inseparable_by_ties(graph)],
        (batch_size, batch is None),
        kind_of_device(device),
    )

    def measured() -> str:
        _log.info("profiling %d layers on %s", len(graph.layers), device)
        profile = measure(graph, batch_size=batch_size, device=device, batch=batch, progress=True)
        return profile.to_json()

    return cached("profile", about, measured, Profile.from_json)
