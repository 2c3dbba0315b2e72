"""Brings the processes of a run together: first among themselves, then in JAX."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Sequence

from pdjax.distributed.acceptor import Acceptor, handshake
from pdjax.distributed.connect import connect_all
from pdjax.distributed.connections import Connections
from pdjax.distributed.coordinator_proxy import CoordinatorProxy
from pdjax.distributed.exit import EndOfProgram, end_process, print_last
from pdjax.distributed.failure_detector import heartbeat_seconds
from pdjax.distributed.frames import Link, encode
from pdjax.distributed.heartbeat import Heartbeat
from pdjax.distributed.members import Address, Member, introduce
from pdjax.distributed.options import (
    StartOptions,
    check_same,
    check_seconds,
    device_ids,
    given_or_environment,
)
from pdjax.distributed.peers import Peers
from pdjax.distributed.rendezvous import Rendezvous, is_loopback, listen_for_peers
from pdjax.distributed.rendezvous_client import RendezvousClient
from pdjax.distributed.rendezvous_server import RendezvousServer
from pdjax.errors import ClusterError

# JAX, and what needs it, is imported where it is used: the rest works, and is tested, without.

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
    """Whether this process was started as one of several.

    That is what the variables of `python -m pdjax.launch` say, or `jax.distributed.initialize` if
    it was called before, or the cluster, if JAX knows its kind.

    Raises:
        ValueError: if the variables make no sense.
    """
    from pdjax.distributed import jax_client

    known = given_or_environment(None, None, None)
    if known is not None:
        return known[1] > 1
    if jax_client.is_initialized():
        return jax_client.joined().num_processes > 1
    return jax_client.num_processes_in_cluster() > 1


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

    From then on a process that is killed, fails, is stopped (SIGSTOP) or cannot be reached ends all
    others with a message and exit code 1, within `lost_peer_timeout_s`. One that lives but runs no
    Python, since a call keeps the interpreter lock, does so after 12 times as long: it may be at
    work. One whose main thread waits without end, while its other threads run, is not noticed. The
    program may end at different times in different processes, after the same steps, and each waits
    at its end for the others; a process whose next call of `Pipeline` needs one that has ended ends
    with a message, too. SIGTERM ends a process, unless the program handles it:
    JAX's own preemption service, which would catch it, is not started. (To use that one, call
    `jax.distributed.initialize` before. JAX then speaks to its coordinator directly, and if process
    0 is killed its abort from C++ may come before the message.)

    Set JAX's options for the whole process (`jax.config.update`): those of a ``with`` hold for one
    thread, and on CPUs another one dispatches the updates of replicated stages. Call `sys.exit`
    with a code that is known already, ``code = main(); sys.exit(code)``, if `main` calls this
    function: only what replaces `sys.exit` hears of the code.

    Args:
        coordinator: HOST:PORT at which all others reach process 0; the port must be free there.
        num_processes: how many processes there are.
        process_id: which one this is, from 0.
        timeout_s: seconds to wait for the others.
        lost_peer_timeout_s: seconds within which the loss of a process ends the others.
        local_device_ids: the devices of this host that this process uses; by default all, or what
            JAX finds out under Slurm and Open MPI.

    Raises:
        ValueError: if an argument makes no sense, or only some of the first three are known.
        ClusterError: if the processes do not come together in time, or do not fit together (two
            with one number, different versions of Python or the libraries), or JAX is in use
            already.
    """
    from pdjax.distributed import jax_client
    from pdjax.distributed.store_rendezvous import StoreRendezvous

    if _Run.peers is not None:
        raise ClusterError(
            "pdjax.distributed.initialize was called before; what it returned is "
            "pdjax.distributed.current()."
        )
    check_seconds(timeout_s, lost_peer_timeout_s)
    deadline = time.monotonic() + timeout_s
    known = given_or_environment(coordinator, num_processes, process_id)
    ids = device_ids(local_device_ids)
    if jax_client.is_initialized():
        joined = jax_client.joined()
        check_same(known, joined.num_processes, joined.process_id)
        settings = StartOptions(
            Address.parse(joined.coordinator),
            joined.num_processes,
            joined.process_id,
            lost_peer_timeout_s,
        )
        catch = not jax_client.handles_sigterm()
        return meet(settings, StoreRendezvous, deadline, catch_sigterm=catch)
    if known is None:
        known, ids = _detect(ids, timeout_s)
    settings = StartOptions(*known, lost_peer_timeout_s)
    kind = RendezvousClient if settings.process_id else RendezvousServer
    peers = meet(settings, kind, deadline, problem=_used_before())
    _start_jax(settings, ids, peers, deadline)
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


def _detect(
    ids: tuple[int, ...] | None, timeout_s: float
) -> tuple[tuple[Address, int, int], tuple[int, ...] | None]:
    """What JAX finds out: coordinator, processes and which one this is; and its devices.

    Raises:
        ValueError: if nothing says it.
    """
    from pdjax.distributed import jax_client

    found = jax_client.detect(timeout_s)
    if found is None:
        raise ValueError(
            "nothing says which processes there are. Give coordinator, num_processes and "
            "process_id, or start the program with 'python -m pdjax.launch', or under Slurm, Open "
            "MPI, Kubernetes or on a TPU pod."
        )
    joined, detected_ids = found
    address = Address.parse(joined.coordinator)
    return (address, joined.num_processes, joined.process_id), detected_ids if ids is None else ids


def meet(
    settings: StartOptions,
    make: Callable[[Address, Member, float], Rendezvous],
    deadline: float,
    *,
    problem: str | None = None,
    catch_sigterm: bool = True,
) -> Peers:
    """Connects the processes, and begins to watch over them; JAX plays no part in it.

    Args:
        settings: how this process takes part.
        make: makes the meeting.
        deadline: when to give up, as `time.monotonic` has it.
        problem: why this process cannot take part, for the others; None if it can.
        catch_sigterm: whether SIGTERM ends the program, if that has no handler of its own.

    Raises:
        ClusterError: if they do not come together.
    """
    listener = listen_for_peers()
    own = introduce(
        settings.process_id,
        settings.num_processes,
        Address("", listener.getsockname()[1]),
        _versions(),
        settings.lost_peer_timeout_s,
        problem,
    )
    with contextlib.ExitStack() as stack:
        acceptor = stack.enter_context(contextlib.closing(Acceptor(listener, own.token)))
        rendezvous = make(settings.coordinator, own, deadline)
        members, links = bring_together(rendezvous, settings, acceptor, deadline)
        stack.pop_all()  # it goes well: the connections close the acceptor
    connections = Connections(
        members, settings.process_id, links, acceptor, print_last, end_process
    )
    connections.start()
    heartbeat = start_heartbeat(members, settings)
    _Run.peers = Peers(members, settings.process_id, connections, heartbeat)
    _Run.end = EndOfProgram(_Run.peers, catch_sigterm)
    _Run.end.watch()
    return _Run.peers


def bring_together(
    rendezvous: Rendezvous, settings: StartOptions, acceptor: Acceptor, deadline: float
) -> tuple[list[Member], dict[int, Link]]:
    """Meets the others and connects to them; returns all, in order, and the links by process id.

    Args:
        rendezvous: how they meet.
        settings: how this process takes part.
        acceptor: where the others come in.
        deadline: when to give up, as `time.monotonic` has it.

    Raises:
        ClusterError: if that does not succeed everywhere.
    """
    links: dict[int, Link] = {}
    problem = None
    with contextlib.closing(rendezvous):
        members = rendezvous.meet()
        own_id, host = settings.process_id, settings.coordinator.host
        try:
            links = connect_all(members, own_id, host, acceptor, deadline, rendezvous.look)
        except ClusterError as error:
            problem = str(error)
        try:
            rendezvous.agree(problem)
        except ClusterError:
            for link in links.values():
                link.close()
            raise
    return members, links


def start_heartbeat(members: Sequence[Member], settings: StartOptions) -> Heartbeat:
    """Starts what says to the others that this process lives."""
    targets = []
    for member in members:
        if member.process_id != settings.process_id:
            address = member.address.seen_from(settings.coordinator.host)
            words = handshake(settings.process_id, member, is_heartbeat=True)
            targets.append((address.host, address.port, words))
    return Heartbeat(targets, encode({"kind": "heartbeat"}), heartbeat_seconds(members))


def _used_before() -> str | None:
    from pdjax.distributed import jax_client

    if jax_client.has_started_backends():
        return (
            "JAX was used before pdjax.distributed.initialize was called (jax.devices() or any "
            "computation); call it first."
        )
    return None


def _start_jax(
    settings: StartOptions, ids: tuple[int, ...] | None, peers: Peers, deadline: float
) -> None:
    """Tells JAX of the processes.

    Raises:
        ClusterError: if JAX cannot start.
    """
    from pdjax.distributed import jax_client

    coordinator = settings.coordinator
    bind_address = None
    address = str(coordinator)
    if settings.process_id:
        address = CoordinatorProxy(coordinator.host, coordinator.port, deadline).address
    elif is_loopback(coordinator.host):
        bind_address = address
    joined = jax_client.Joined(address, settings.num_processes, settings.process_id)
    try:
        jax_client.initialize(joined, ids, bind_address, deadline - time.monotonic())
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
