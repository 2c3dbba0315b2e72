"""Brings the processes of a run together: first among themselves, then in JAX."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Sequence

from pdjax.distributed.connecting import connect_all
from pdjax.distributed.ending import EndOfProgram, end_process
from pdjax.distributed.members import Address, Member, introduce
from pdjax.distributed.mesh import Mesh
from pdjax.distributed.peers import Peers
from pdjax.distributed.relay import Relay
from pdjax.distributed.rendezvous import (
    Rendezvous,
    is_loopback,
    listen_for_peers,
    make_rendezvous,
)
from pdjax.distributed.settings import (
    Settings,
    check_seconds,
    device_ids,
    given_or_environment,
)
from pdjax.errors import ClusterError

# JAX, and what needs it, is imported where it is used: the rest works, and is tested, without.
_Make = Callable[[Address, Member, float], Rendezvous]

_LIBRARIES = ("jax", "jaxlib", "flax", "optax")


class _Run:
    """The run that this process takes part in, while it does."""

    peers: Peers | None = None
    end: EndOfProgram | None = None
    started_jax: bool = False


def current() -> Peers | None:
    """The processes of the run that `initialize` has brought together; None without it."""
    return _Run.peers


def is_needed() -> bool:
    """Whether this process was started as one of several, or JAX was told so already.

    It looks at the variables of `python -m pdjax.launch` and of the clusters that JAX knows; a
    cluster job of a single process is one, too, and works.
    """
    from pdjax.distributed import jax_client

    return (
        given_or_environment(None, None, None) is not None
        or jax_client.is_initialized()
        or jax_client.is_in_cluster()
    )


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = 300.0,
    lost_peer_timeout_s: float = 10.0,
    local_device_ids: int | Sequence[int] | None = None,
) -> Peers:
    """Brings this process together with the others of the run; call it before JAX is used.

    What is not given is read from PDJAX_COORDINATOR, PDJAX_NUM_PROCESSES and PDJAX_PROCESS_ID,
    which `python -m pdjax.launch` sets; without these JAX finds it out under Slurm, Open MPI,
    Kubernetes and on TPU pods. If `jax.distributed.initialize` was called before, the processes are
    those that it was given.

    From then on a process that is killed, fails, hangs or cannot be reached ends all others with a
    message and exit code 1.

    Args:
        coordinator: HOST:PORT at which all others reach process 0; the port must be free there.
        num_processes: how many processes there are.
        process_id: which one this is, from 0.
        timeout_s: seconds to wait for the others.
        lost_peer_timeout_s: seconds within which the loss of a process ends the others.
        local_device_ids: the devices of this host that this process uses; by default all, or what
            JAX says under Slurm and Open MPI.

    Raises:
        ValueError: if an argument makes no sense, or only some of the first three are known.
        ClusterError: if the processes do not come together in time, or do not fit together (two
            with one number, different versions of Python or the libraries), or JAX is in use
            already.
    """
    if _Run.peers is not None:
        raise ClusterError(
            "pdjax.distributed.initialize was called before; what it returned is "
            "pdjax.distributed.current()."
        )
    from pdjax.distributed import jax_client
    from pdjax.distributed.store import StoreRendezvous

    deadline = time.monotonic() + timeout_s
    check_seconds(timeout_s, lost_peer_timeout_s)
    known = given_or_environment(coordinator, num_processes, process_id)
    ids = device_ids(local_device_ids)
    if jax_client.is_initialized():
        settings = _as_joined(known, timeout_s, lost_peer_timeout_s)
        return _meet(settings, StoreRendezvous, None, deadline)
    if known is None:
        settings = _as_detected(ids, timeout_s, lost_peer_timeout_s)
    else:
        settings = Settings(*known, ids, timeout_s, lost_peer_timeout_s)
    peers = _meet(settings, make_rendezvous, _used_before(), deadline)
    _start_jax(settings, peers, deadline)
    return peers


def shutdown() -> None:
    """Ends this process's part in the run: waits until all others do the same, and leaves JAX's.

    At the end of a program it happens by itself. Without a run it does nothing.
    """
    peers, end = _Run.peers, _Run.end
    if peers is None or end is None:
        return
    peers.close()
    if _Run.started_jax and not peers.has_failed:
        from pdjax.distributed import jax_client

        jax_client.shutdown()
    end.forget()
    _Run.peers = _Run.end = None
    _Run.started_jax = False


def _as_joined(
    known: tuple[Address, int, int] | None, timeout_s: float, lost_peer_timeout_s: float
) -> Settings:
    """How JAX was told to take part.

    Raises:
        ValueError: if this process is told otherwise now.
    """
    from pdjax.distributed import jax_client

    joined = jax_client.joined()
    if known is not None and known[1:] != (joined.num_processes, joined.process_id):
        raise ValueError(
            f"got num_processes {known[1]} and process_id {known[2]}, but jax.distributed was "
            f"initialized with {joined.num_processes} and {joined.process_id}. Leave them out, or "
            "leave jax.distributed.initialize to pdjax.distributed.initialize."
        )
    return Settings(
        Address.parse(joined.coordinator),
        joined.num_processes,
        joined.process_id,
        None,
        timeout_s,
        lost_peer_timeout_s,
    )


def _as_detected(
    ids: tuple[int, ...] | None, timeout_s: float, lost_peer_timeout_s: float
) -> Settings:
    """How JAX finds out that this process takes part.

    Raises:
        ValueError: if nothing says so.
    """
    from pdjax.distributed import jax_client

    found = jax_client.detect(timeout_s)
    if found is None:
        raise ValueError(
            "nothing says which processes there are. Give coordinator, num_processes and "
            "process_id, or start the program with 'python -m pdjax.launch', or under Slurm, Open "
            "MPI, Kubernetes or on a TPU pod."
        )
    if ids is None and found.local_device_ids is not None:
        ids = tuple(found.local_device_ids)
    return Settings(
        Address.parse(found.coordinator),
        found.num_processes,
        found.process_id,
        ids,
        timeout_s,
        lost_peer_timeout_s,
    )


def _meet(settings: Settings, make: _Make, problem: str | None, deadline: float) -> Peers:
    """Connects the processes, and begins to watch over them."""
    own_id = settings.process_id
    with listen_for_peers() as listener:
        own = introduce(
            own_id,
            settings.num_processes,
            Address("", listener.getsockname()[1]),
            _versions(),
            settings.lost_peer_timeout_s,
            problem,
        )
        rendezvous = make(settings.coordinator, own, deadline)
        try:
            members = rendezvous.meet()
            links = {}
            try:
                links = connect_all(members, own_id, settings.coordinator.host, listener, deadline)
            except ClusterError as error:
                problem = str(error)
            rendezvous.agree(problem)
        finally:
            rendezvous.close()
    mesh = Mesh(members, own_id, links, end_process)
    peers = Peers(members, own_id, mesh)
    mesh.start()
    _Run.peers, _Run.end = peers, EndOfProgram(peers)
    _Run.end.watch()
    return peers


def _used_before() -> str | None:
    from pdjax.distributed import jax_client

    if jax_client.has_started_backends():
        return (
            "JAX was used before pdjax.distributed.initialize was called (jax.devices() or any "
            "computation); call it first."
        )
    return None


def _start_jax(settings: Settings, peers: Peers, deadline: float) -> None:
    """Tells JAX of the processes.

    Raises:
        ClusterError: if JAX cannot start.
    """
    from pdjax.distributed import jax_client

    coordinator = settings.coordinator
    bind_address = None
    address = str(coordinator)
    if settings.process_id:
        address = Relay(coordinator.host, coordinator.port, deadline).address
    elif is_loopback(coordinator.host):
        bind_address = address
    try:
        jax_client.initialize(
            jax_client.Joined(address, settings.num_processes, settings.process_id),
            settings.local_device_ids,
            bind_address,
            deadline - time.monotonic(),
        )
    except Exception as error:
        peers.fail(f"JAX could not start: {error}")
        raise ClusterError(f"JAX could not start at {coordinator}: {error}") from error
    _Run.started_jax = True


def _versions() -> dict[str, str]:
    """What must agree: a different third number of Python does no harm."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    versions["pdjax"] = getattr(sys.modules["pdjax"], "__version__", "unknown")
    for name in _LIBRARIES:
        versions[name] = importlib.metadata.version(name)
    return versions
