"""How the processes of a run find each other, before JAX is told.

Process 0 listens at the coordinator's address, and everybody else tells it who they are and where
they listen. It checks that all fit together and answers *all* of them, the unfit too, so that every
process ends with the reason and none waits for others that will not come. Later JAX's own service
listens at the same port.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import replace

from pdjax.distributed.frames import ForeignError, Link, Message, encode
from pdjax.distributed.members import Address, Member, find_disagreement
from pdjax.errors import ClusterError

_RETRY_S = 0.1
_LINGER_S = 5.0
_FLUSH_S = 1.0
_BACKLOG = 1024


class Rendezvous:
    """The meeting of all processes; `meet`, then `agree`, then `close`.

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


def make_rendezvous(coordinator: Address, own: Member, deadline: float) -> Rendezvous:
    """The meeting as process 0, or as another, holds it."""
    kind = Host if own.process_id == 0 else Guest
    return kind(coordinator, own, deadline)


class Host(Rendezvous):
    """The meeting as process 0 sees it."""

    def __init__(self, coordinator: Address, own: Member, deadline: float) -> None:
        super().__init__(coordinator, own, deadline)
        self._guests: dict[Link, Member | None] = {}
        self._said: dict[Link, Message] = {}
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None

    def meet(self) -> list[Member]:
        """Takes in all others, and tells all who there is."""
        self._listen()
        problem = find_disagreement([self._own])
        while problem is None and not self._all_came():
            if time.monotonic() > self._deadline:
                problem = self._missing()
            else:
                problem = self._step(self._deadline)
        if problem is not None:
            self._refuse(problem)
        members = sorted(self._members(), key=lambda member: member.process_id)
        self._stop_listening()
        self._answer({"members": [member.to_json() for member in members]})
        return members

    def agree(self, problem: str | None) -> None:
        """Hears all others, and tells all the outcome."""
        while problem is None and len(self._said) < self._own.num_processes - 1:
            if time.monotonic() > self._deadline:
                problem = self._silent()
            else:
                problem = self._step(self._deadline)
        if problem is not None:
            self._refuse(problem)
        self._answer({"agreed": True})

    def close(self) -> None:
        """Closes all connections."""
        self._stop_listening()
        for link in list(self._guests):
            self._forget(link)
        self._selector.close()

    def _listen(self) -> None:
        try:
            self._listener = _listen_at(self._coordinator)
        except OSError as error:
            raise ClusterError(_cannot_listen(self._coordinator, error)) from error
        self._selector.register(self._listener, selectors.EVENT_READ)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _members(self) -> list[Member]:
        return [self._own, *(member for member in self._guests.values() if member is not None)]

    def _all_came(self) -> bool:
        return len(self._members()) == self._own.num_processes

    def _step(self, deadline: float) -> str | None:
        """Waits for something to happen; returns what is wrong now, if something is."""
        timeout = max(0.0, deadline - time.monotonic())
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._listener:
                self._accept()
            else:
                assert isinstance(key.fileobj, Link)
                problem = self._read(key.fileobj)
                if problem is not None:
                    return problem
        return None

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            link = Link(self._listener.accept()[0])
            self._guests[link] = None
            self._selector.register(link, selectors.EVENT_READ)

    def _read(self, link: Link) -> str | None:
        try:
            messages = link.read(time.monotonic())
            for message in messages:
                problem = self._hear(link, message)
                if problem is not None:
                    return problem
        except (ForeignError, KeyError, TypeError):
            self._forget(link)  # some other program that tries ports
            return None
        if link.ended is not None:
            member = self._guests[link]
            self._forget(link)
            if member is not None:
                return f"{member} ended while the processes were being brought together."
        return None

    def _hear(self, link: Link, message: Message) -> str | None:
        if self._guests[link] is None:
            self._guests[link] = Member.from_json(message["member"])
            problem = find_disagreement(self._members())
            if problem is None:
                self._answer({"missing": self._missing_ids()})
            return problem
        self._said[link] = message
        problem = message["problem"]
        return None if problem is None else f"{self._guests[link]}: {problem}"

    def _refuse(self, problem: str) -> None:
        """Tells everybody, also those who come a little later, and raises."""
        end = time.monotonic() + _LINGER_S
        while self._listener is not None and not self._all_came() and time.monotonic() < end:
            worse = self._step(end)
            # Versions are all named once all have come; any other problem stands as it was.
            if worse is not None and worse.split(":")[0] == problem.split(":")[0]:
                problem = worse
        self._answer({"refused": problem})
        raise ClusterError(problem)

    def _answer(self, message: Message) -> None:
        frame = encode(message)
        known = [link for link, member in self._guests.items() if member is not None]
        for link in known:
            link.send(frame)
        end = time.monotonic() + _FLUSH_S
        while any(link.has_outgoing for link in known) and time.monotonic() < end:
            time.sleep(0.001)
            for link in known:
                link.flush()

    def _forget(self, link: Link) -> None:
        self._selector.unregister(link)
        link.close()
        self._guests.pop(link, None)

    def _missing_ids(self) -> list[int]:
        came = {member.process_id for member in self._members()}
        return [number for number in range(self._own.num_processes) if number not in came]

    def _missing(self) -> str:
        return _missing_text(self._own.num_processes, self._missing_ids(), str(self._coordinator))

    def _silent(self) -> str:
        silent = [str(m) for link, m in self._guests.items() if m and link not in self._said]
        return f"{', '.join(silent)} did not connect to the other processes in time."


class Guest(Rendezvous):
    """The meeting as every other process sees it."""

    def __init__(self, coordinator: Address, own: Member, deadline: float) -> None:
        super().__init__(coordinator, own, deadline)
        self._link: Link | None = None
        self._missing: list[int] = []

    def meet(self) -> list[Member]:
        """Tells process 0 of this one; hears who there is."""
        message = None
        while message is None:
            self._link = self._connect()
            message = self._ask()
        return [Member.from_json(member) for member in message["members"]]

    def agree(self, problem: str | None) -> None:
        """Tells process 0; hears the outcome."""
        assert self._link is not None
        self._link.send(encode({"problem": problem}))
        answer = self._receive("agreed")
        if answer is None:
            raise ClusterError(problem or self._coordinator_ended())

    def close(self) -> None:
        """Closes the connection to process 0."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _connect(self) -> Link:
        """Connects to process 0, which may start later."""
        while True:
            remaining = self._deadline - time.monotonic()
            try:
                if remaining <= 0:
                    raise TimeoutError("no answer")
                found = socket.create_connection(
                    (self._coordinator.host, self._coordinator.port), remaining
                )
                return Link(found)
            except OSError as error:
                if time.monotonic() + _RETRY_S > self._deadline:
                    raise ClusterError(_unreachable(self._own, self._coordinator, error)) from error
                time.sleep(_RETRY_S)

    def _ask(self) -> Message | None:
        """What process 0 answers; None if the one who listens there is not process 0."""
        assert self._link is not None
        address = self._own.address
        if not address.host:
            address = replace(address, host=reachable_host(self._link.own_address))
        self._link.send(encode({"member": replace(self._own, address=address).to_json()}))
        try:
            answer = self._receive("members")
        except ForeignError:
            answer = None
        if answer is None:
            self._link.close()
            if self._missing:
                raise ClusterError(self._coordinator_ended())
            time.sleep(_RETRY_S)
        return answer

    def _receive(self, wanted: str) -> Message | None:
        """The next message that has `wanted`; None if the connection ends before.

        Raises:
            ClusterError: if it is a refusal, or does not come in time.
        """
        assert self._link is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._link, selectors.EVENT_READ)
            while self._link.ended is None:
                remaining = self._deadline + _FLUSH_S - time.monotonic()
                if remaining <= 0:
                    raise ClusterError(self._late())
                self._link.flush()
                selector.select(min(remaining, _RETRY_S))
                for message in self._link.read(time.monotonic()):
                    if "refused" in message:
                        raise ClusterError(message["refused"])
                    self._missing = message.get("missing", self._missing)
                    if wanted in message:
                        return message
        return None

    def _late(self) -> str:
        if self._missing:
            return _missing_text(self._own.num_processes, self._missing, str(self._coordinator))
        return (
            f"{self._own}: what listens at {self._coordinator} does not answer as process 0 of "
            "pdjax does. Is the port used by another program?"
        )

    def _coordinator_ended(self) -> str:
        return (
            f"process 0, the coordinator at {self._coordinator}, ended while the processes were "
            "being brought together; its own output says why."
        )


def listen_for_peers() -> socket.socket:
    """A listener on a free port, at all addresses of this host."""
    return _listen_at(Address("", 0))


def _listen_at(address: Address) -> socket.socket:
    """A listener: at the loopback address if that is the host, else at all of this host's."""
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
    if host.startswith("::ffff:"):
        host = host[len("::ffff:") :]
    return "" if is_loopback(host) else host


def _missing_text(num_processes: int, missing: Sequence[int], coordinator: str) -> str:
    numbers = ", ".join(map(str, missing))
    which = f"process {numbers}" if len(missing) == 1 else f"processes {numbers}"
    return (
        f"{which} of {num_processes} did not come to the coordinator at {coordinator} in time. "
        "Are all started, with the same coordinator and num_processes, and does a firewall let "
        "them through?"
    )


def _unreachable(own: Member, coordinator: Address, error: OSError) -> str:
    return (
        f"{own} could not reach the coordinator at {coordinator} in time ({error}). Is process 0 "
        "started, is this the address of its host, and does a firewall let the port through?"
    )


def _cannot_listen(coordinator: Address, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"process 0 cannot listen at {coordinator}: port {coordinator.port} is in use on this "
            "host, by another run, another process that was given process_id 0, or another "
            "program. Give all processes a coordinator with another port."
        )
    return f"process 0 cannot listen at {coordinator}: {error}."
