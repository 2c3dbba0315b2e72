"""Profiles and plans a model when nobody gave a plan.

Measuring takes seconds, and comes out a little differently each time. So what was measured is kept:
in this process, and, if JAX has a directory for its compilation cache (the option
`jax_compilation_cache_dir`), in a file there. The same model then gets the same plan again, and
finds its compiled programs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from pdjax.bandwidth import measure_bandwidth
from pdjax.graph import LayerGraph, model_fingerprint
from pdjax.planner import Plan, PlanOptions, plan_pipeline
from pdjax.planner.cuts import check_enough_layers
from pdjax.profile import FORMAT, Profile
from pdjax.profiler import check_profile, measure
from pdjax.topology import Topology

_log = logging.getLogger("pdjax")

_measured: dict[str, str] = {}


@dataclass(frozen=True)
class Machines:
    """What an automatic plan is made for.

    Attributes:
        devices: the workers, in order.
        topology: how they are joined; measured if None.
        profile: the layers' figures; measured on the first device if None.
    """

    devices: tuple[Any, ...]
    topology: Topology | None = None
    profile: Profile | None = None


def automatic_plan(
    graph: LayerGraph, machines: Machines, options: PlanOptions, batch_size: int, batch: Any
) -> Plan:
    """The fastest plan for a model on the devices at hand.

    Args:
        graph: the model, traced for one microbatch.
        machines: what the plan is for.
        options: what the plan is to be like.
        batch_size: examples in a microbatch.
        batch: a microbatch, for the measurement; None to make one up.

    Raises:
        ValueError: if no plan is possible, or profile or topology do not go with model or devices.
    """
    check_enough_layers(graph.names, options.num_stages or 1)
    topology, devices = machines.topology, machines.devices
    if topology is not None and topology.num_workers > len(devices):
        raise ValueError(
            f"the topology {topology} has {topology.num_workers} workers, but there are "
            f"{len(devices)} devices: {list(devices)}. Give a topology of these, or plan for "
            "other machines with 'python -m pdjax.plan'."
        )
    if options.num_stages == 1 or (options.num_stages is None and len(devices) == 1):
        return Plan(graph.names, (0,), (1.0,), model_fingerprint(graph))
    if machines.profile is None:
        profile = measured_profile(graph, devices[0], batch_size, batch)
    else:
        profile = check_profile(machines.profile, graph, batch_size=batch_size, device=devices[0])
    if topology is None:
        speed = _measured_bandwidth(devices)
        topology = Topology.local(devices, bandwidth_bytes_per_s=speed)
    plan = plan_pipeline(profile, topology, options)
    if plan.prediction is not None:
        _log.info("%s", plan.prediction.advice)
    return plan


def measured_profile(graph: LayerGraph, device: Any, batch_size: int, batch: Any) -> Profile:
    """The model's profile, from before if there is one for the same layers on such a device."""
    about = [[layer.name, layer.fingerprint, layer.cut_bytes] for layer in graph.layers]
    key = _key("profile", FORMAT, about, batch_size, *_kind(device))

    def make() -> str:
        _log.info("profiling %d layers on %s", len(graph.layers), device)
        made = measure(graph, batch_size=batch_size, device=device, batch=batch, progress=True)
        return made.to_json()

    return Profile.from_json(_remembered("profile", key, make))


def _measured_bandwidth(devices: Sequence[Any]) -> float:
    kinds = [(device.id, *_kind(device)) for device in devices]
    key = _key("bandwidth", kinds)
    return float(json.loads(_remembered("bandwidth", key, lambda: str(measure_bandwidth(devices)))))


def _kind(device: Any) -> tuple[str, str, str]:
    return device.platform, device.device_kind, jax.__version__


def _key(*about: Any) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _remembered(kind: str, key: str, make: Callable[[], str]) -> str:
    """What `make` returned when it was last asked for with the same key."""
    if key not in _measured:
        file = _file(kind, key)
        found = _read(file)
        if found is None:
            found = make()
            _write(file, found)
        _measured[key] = found
    return _measured[key]


def _file(kind: str, key: str) -> Path | None:
    directory = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not directory or "://" in directory:  # a bucket is not ours to write to
        return None
    return Path(directory) / f"pdjax-{kind}-{key}.json"


def _read(file: Path | None) -> str | None:
    try:
        text = file.read_text() if file is not None else None
        json.loads(text or "null")
    except (OSError, ValueError):  # none there, or one that was half written by a crash
        return None
    return text


def _write(file: Path | None, text: str) -> None:
    """Writes at once or not at all: processes may share the directory."""
    if file is None:
        return
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        draft.replace(file)
    except OSError as error:
        _log.warning("what was measured cannot be kept for the next run: %s", error)
