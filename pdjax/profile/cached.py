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
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from pdjax.plan import Plan, PlanOptions, plan_pipeline
from pdjax.plan.balance import check_enough_layers
from pdjax.profile.check import check_profile
from pdjax.profile.measure import measure
from pdjax.profile.profile import FORMAT, Profile
from pdjax.split.state_placement import inseparable_by_state, inseparable_by_ties
from pdjax.topology.bandwidth import ALONE_BYTES_PER_S, measure_bandwidth
from pdjax.topology.topology import Topology
from pdjax.trace import jaxprs
from pdjax.trace.layers import LayerGraph, model_fingerprint

_log = logging.getLogger("pdjax")

_Read = TypeVar("_Read")

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
    alone = (options.num_stages == 1 and options.straight) or len(devices) == 1
    if alone and topology is None:  # no link matters, but memory may
        topology = Topology.local(devices, bandwidth_bytes_per_s=ALONE_BYTES_PER_S)
    if alone and topology is not None and not topology.memory_bytes:
        return Plan(graph.names, (0,), (1.0,), model_fingerprint(graph))
    profile = find_profile(machines.profile, graph, devices[0], batch_size, batch)
    return plan_pipeline(profile, topology or local_topology(devices), options)


def local_topology(devices: Sequence[Any]) -> Topology:
    """How devices of this process are joined: measured, or from before."""
    if len(devices) == 1:  # no link matters
        return Topology.local(devices, bandwidth_bytes_per_s=ALONE_BYTES_PER_S)
    return Topology.local(devices, bandwidth_bytes_per_s=_measured_bandwidth(devices))


def find_profile(
    given: Profile | None, graph: LayerGraph, device: Any, batch_size: int, batch: Any
) -> Profile:
    """The model's profile: the one that was given, made fit for these microbatches, or a measured.

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
    key = _key(
        "profile",
        FORMAT,
        model_fingerprint(graph),
        [(x.name, x.fingerprint, x.cut_bytes, x.param_bytes, x.params) for x in graph.layers],
        [str(jaxprs.aval(var)) for var in (*traced.params, *traced.state, *traced.batch)],
        [inseparable_by_state(graph), inseparable_by_ties(graph)],
        (batch_size, batch is None),
        _kind(device),
    )

    def make() -> str:
        _log.info("profiling %d layers on %s", len(graph.layers), device)
        made = measure(graph, batch_size=batch_size, device=device, batch=batch, progress=True)
        return made.to_json()

    return _remembered("profile", key, make, Profile.from_json)


def _measured_bandwidth(devices: Sequence[Any]) -> float:
    key = _key("bandwidth", [(device.id, *_kind(device)) for device in devices])
    return _remembered("bandwidth", key, lambda: str(measure_bandwidth(devices)), _read_bandwidth)


def _read_bandwidth(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(f"a bandwidth of {value} bytes/s")
    return value


def _kind(device: Any) -> tuple[str, str, str]:
    return device.platform, device.device_kind, jax.__version__


def _key(*about: Any) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _remembered(
    kind: str, key: str, make: Callable[[], str], read: Callable[[str], _Read]
) -> _Read:
    """What `make` returned when it was last asked for with the same key, read by `read`."""
    if key not in _measured:
        file = _file(kind, key)
        text = _text_of(file)
        try:
            read(text)
        except (ValueError, TypeError):  # none is there, or it was half written by a crash
            text = make()
            _write(file, text)
        _measured[key] = text
    return read(_measured[key])


def _file(kind: str, key: str) -> Path | None:
    directory = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not directory or "://" in directory:  # a bucket is not ours to write to
        return None
    return Path(directory) / f"pdjax-{kind}-{key}.json"


def _text_of(file: Path | None) -> str:
    try:
        return "" if file is None else file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


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
