"""Whether a profile fits a model, a batch size and a device."""

from __future__ import annotations

from typing import Any

from pdjax.profile.device import device_kind, placement_of
from pdjax.profile.profile import Profile
from pdjax.trace.layers import LayerGraph, model_fingerprint


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
    expected = model_fingerprint(graph)
    if profile.model and profile.model != expected:
        raise ValueError(
            f"the profile is of another model: its fingerprint is {profile.model}, that of this "
            f"model {expected}. The layers have the same names, but other parameters or sizes. "
            "Profile this model."
        )
    if device is not None and profile.device:
        _check_device(profile, device_kind(placement_of(device)))
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
