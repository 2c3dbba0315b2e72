"""The parts of JAX, some of them private, that make other processes known to it."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax._src import clusters, distributed, xla_bridge

from pdjax.errors import PdjaxWarning

_SHUTDOWN_TIMEOUT_S = 30


@dataclass(frozen=True)
class Joined:
    """The description of the processes that JAX gets.

    Attributes:
        coordinator: HOST:PORT at which this process reaches JAX's service.
    """

    coordinator: str
    num_processes: int
    process_id: int


def detect(timeout_s: float) -> tuple[Joined, tuple[int, ...] | None] | None:
    """What Slurm, Open MPI, Kubernetes or the TPU pod say of the processes; None if there is none.

    Returns:
        The description for JAX, and the devices of this host that this process uses (None for all).
    """
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(timeout_s)
    )
    coordinator, num_processes, process_id, ids = found
    if coordinator is None or num_processes is None or process_id is None:
        return None
    return Joined(coordinator, num_processes, process_id), None if ids is None else tuple(ids)


def num_processes_in_cluster() -> int:
    """How many processes Slurm, Open MPI, Kubernetes or the TPU pod have started; else 1."""
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.opt_in_only_method or not kind.is_env_present():
            continue
        try:
            return kind.get_process_count()
        except (KeyError, TypeError):
            return 1  # Kubernetes, but not one of its jobs
        except RuntimeError as error:
            warnings.warn(
                f"the cluster does not say how many processes there are: {error}\nThis one goes on "
                "alone. Give coordinator, num_processes and process_id if there are others.",
                PdjaxWarning,
                stacklevel=3,
            )
            return 1
    return 1


def handles_sigterm() -> bool:
    """Whether the program made other processes known to JAX, which then catches SIGTERM itself."""
    return distributed.global_state.preemption_sync_manager is not None


def has_started_backends() -> bool:
    """Whether JAX was used already, so that it is too late to tell it of other processes."""
    return xla_bridge.backends_are_initialized()


def is_initialized() -> bool:
    """Whether JAX knows other processes."""
    return jax.distributed.is_initialized()


def initialize(
    joined: Joined,
    local_device_ids: Sequence[int] | None,
    bind_address: str | None,
    timeout_s: float,
) -> None:
    """Tells JAX of the processes; starts its service in process 0.

    Args:
        joined: how this process takes part.
        local_device_ids: the devices of this host that it uses; None for all.
        bind_address: where the service listens; None for all addresses of the host.
        timeout_s: seconds to wait for the others.

    Raises:
        Exception: whatever JAX raises if it cannot start.
    """
    # JAX's answer to SIGTERM would be to note it and live on, until the program asks about it.
    jax.config.update("jax_enable_preemption_service", False)
    with _without_proxy(joined.coordinator.rpartition(":")[0]):
        jax.distributed.initialize(
            joined.coordinator,
            joined.num_processes,
            joined.process_id,
            local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=max(int(timeout_s), 1),
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S,
            coordinator_bind_address=bind_address,
        )


@contextlib.contextmanager
def _without_proxy(host: str) -> Iterator[None]:
    """Inside, no HTTP proxy that the environment names is used to reach that host."""
    if not any(os.environ.get(name) for name in ("grpc_proxy", "https_proxy", "http_proxy")):
        yield
        return
    variable = "no_grpc_proxy"
    before = os.environ.get(variable)
    others = before if before is not None else os.environ.get("no_proxy", "")
    os.environ[variable] = f"{others},{host}".lstrip(",")
    jax.config.update("jax_check_proxy_envs", False)  # it would warn of what is solved here
    try:
        yield
    finally:
        jax.config.update("jax_check_proxy_envs", True)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def shutdown() -> None:
    """Waits until all processes do the same, and ends JAX's service."""
    jax.distributed.shutdown()


def joined() -> Joined:
    """The description that this process started JAX with."""
    state = distributed.global_state
    assert state.coordinator_address is not None
    return Joined(state.coordinator_address, state.num_processes, state.process_id)


def exchange(key: str, value: Any, timeout_s: float) -> list[Any]:
    """Tells all processes a value, through JAX's own store; returns all, in order of process.

    Raises:
        TimeoutError: if one has not given its value in time.
    """
    client = distributed.global_state.client
    assert client is not None
    state = joined()
    deadline = time.monotonic() + timeout_s
    client.key_value_set(f"{key}/{state.process_id}", json.dumps(value))
    values = []
    for number in range(state.num_processes):
        remaining_ms = max(int((deadline - time.monotonic()) * 1000), 1)
        try:
            values.append(
                json.loads(client.blocking_key_value_get(f"{key}/{number}", remaining_ms))
            )
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(f"process {number} of {state.num_processes}") from error
    return values
