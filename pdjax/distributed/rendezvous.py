"""The rendezvous of the processes of a run, before JAX is started.

Process 0 listens at the coordinator's address, and everybody else tells it who they are and where
they listen. It checks that all fit together and answers *all* of them, the unfit too, so that every
process ends with the reason and none waits for others that will not come. Later JAX's own service
listens at the same port.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Sequence

from pdjax.distributed.members import Address, Member

RETRY_S = 0.1
_BACKLOG = 1024


class Rendezvous:
    """The meeting of all processes; `meet`, then `agree`, at last `close`.

    Args:
        coordinator: where process 0 listens.
        own: this process.
        deadline: when to give up, as `time.monotonic` has it.
    """

    def __init__(self, coordinator: Address, own: Member, deadline: float) -> None:
        self._coordinator = coordinator
        self._own = own
        self._deadline = deadline

    def meet(self) -> list[Member]:
        """Waits until all processes have come; returns them in order.

        Raises:
            ClusterError: if they do not come in time, do not fit together, or the address cannot
                be used.
        """
        raise NotImplementedError

    def look(self) -> None:
        """To be called now and then between `meet` and `agree`; never waits long.

        Raises:
            ClusterError: if a process has left, with its reason.
        """
        raise NotImplementedError

    def agree(self, problem: str | None) -> None:
        """Waits until all have said whether they go on.

        Args:
            problem: why this process cannot; None if it can.

        Raises:
            ClusterError: if one cannot, with its reason.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Closes what is open; the address is free again."""
        raise NotImplementedError


def listen_for_peers() -> socket.socket:
    """A listener on a free port, at all addresses of this host."""
    return listen_at(Address("", 0))


def listen_at(address: Address) -> socket.socket:
    """A listener: at the loopback address if that is the host, else at all of this host's.

    Raises:
        OSError: if the port is in use.
    """
    host = address.host if is_loopback(address.host) else ""
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = False
    else:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
    host = "127.0.0.1" if host == "localhost" else host
    return socket.create_server(
        (host, address.port), family=family, backlog=_BACKLOG, dualstack_ipv6=both
    )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address reaches no further than the host itself."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def reachable_host(host: str) -> str:
    """The address by which others reach this process.

    Args:
        host: the address from which it reaches the coordinator.

    Returns:
        Empty if that is on the same host: each process knows the coordinator's by a name that works
        there.
    """
    host = host.removeprefix("::ffff:")
    return "" if is_loopback(host) else host


def missing_text(num_processes: int, missing: Sequence[int], coordinator: Address) -> str:
    """That processes did not come."""
    numbers = ", ".join(map(str, missing))
    which = f"process {numbers}" if len(missing) == 1 else f"processes {numbers}"
    return (
        f"{which} of {num_processes} did not come to the coordinator at {coordinator} in time. "
        "Are all started, with the same coordinator and num_processes, and does a firewall let "
        "them through?"
    )
