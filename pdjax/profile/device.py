"""The device that a profile is measured on."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding


def placement_of(device: Any) -> Sharding:
    """A device as a sharding: the first local device for None, a sharding as it is."""
    if isinstance(device, Sharding):
        return device
    return SingleDeviceSharding(jax.local_devices()[0] if device is None else device)


def first_device(placement: Sharding) -> Any:
    """The device of `placement` with the lowest id."""
    return min(placement.device_set, key=lambda device: device.id)


def device_kind(placement: Sharding) -> str:
    """The kind of the devices of `placement`, such as ``"NVIDIA H100"``."""
    return first_device(placement).device_kind
