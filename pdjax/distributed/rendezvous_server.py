"""The meeting of all processes, as process 0 holds it."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import threading
import time

from pdjax.distributed.frames import ForeignError, Link, Message, encode
from pdjax.distributed.members import Address, Member, find_disagreement
from pdjax.distributed.rendezvous import Rendezvous, listen_at, missing_text
from pdjax.distributed.rendezvous_client import RendezvousClient
from pdjax.errors import ClusterError

_LINGER_S = 5.0  # after a problem, so that late processes receive the message, too
_FLUSH_S = 1.0
_VISIT_S = 1.0
_LOOK_S = 0.2


class RendezvousServer(Rendezvous):
    """The meeting at which process 0 awaits the others."""

    def __init__(self, coordinator: Address, own: Member, deadline: float) -> None:
        super().__init__(coordinator, own, deadline)
        self._guests: dict[Link, Member | None] = {}
        self._agreed: set[Link] = set()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._visit = RendezvousClient(coordinator, own, deadline)
        self._turned_away: str | None = None

    def meet(self) -> list[Member]:
        """Takes in all others, and tells all who there is."""
        self._listen()
        problem = find_disagreement([self._own])
        while problem is None and not self._all_came():
            if time.monotonic() > self._deadline:
                problem = self._missing()
            else:
                problem = self._step() or self._turned_away
        if problem is not None:
            self._refuse(problem)
        members = sorted(self._members(), key=lambda member: member.process_id)
        self._stop_listening()
        self._answer({"members": [member.to_json() for member in members]})
        return members

    def look(self) -> None:
        """Ends the meeting for all if one has left."""
        problem = self._step(0.0)
        if problem is not None:
            self._refuse(problem)

    def agree(self, problem: str | None) -> None:
        """Hears all others, and tells all the outcome."""
        if problem is not None:
            problem = f"{self._own}: {problem}"
        while problem is None and len(self._agreed) < self._own.num_processes - 1:
            problem = self._silent() if time.monotonic() > self._deadline else self._step()
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
            self._listener = listen_at(self._coordinator)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ClusterError(self._find_who_listens()) from error
            raise ClusterError(
                f"process 0 cannot listen at {self._coordinator}: {error}."
            ) from error
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        threading.Thread(target=self._visit_coordinator, daemon=True).start()

    def _stop_listening(self) -> None:
        self._visit.give_up()
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _visit_coordinator(self) -> None:
        """Connects to the coordinator like a client: who listens there?"""
        with contextlib.closing(self._visit):
            try:
                self._visit.meet()
            except ClusterError as error:
                if self._visit.was_refused:
                    self._turned_away = str(error)

    def _members(self) -> list[Member]:
        return [self._own, *(member for member in self._guests.values() if member is not None)]

    def _all_came(self) -> bool:
        return len(self._members()) >= self._own.num_processes

    def _step(self, timeout_s: float = _LOOK_S) -> str | None:
        """Waits for something to happen; returns what is wrong then, if something is."""
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
                continue
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
        problem = None
        try:
            for message in link.read(time.monotonic()):
                problem = problem or self._receive(link, message)
        except (ForeignError, KeyError, TypeError, ValueError):
            link.ended = "not a process of pdjax, but some program that tries ports"
        if link.ended is None:
            return problem
        member = self._guests[link]
        self._forget(link)
        if member is None:
            return None
        return problem or f"{member} ended while the processes were being brought together."

    def _receive(self, link: Link, message: Message) -> str | None:
        """Takes note of a message; returns what is wrong with it, if something is."""
        if self._guests[link] is not None:
            self._agreed.add(link)
            problem = message["problem"]
            return None if problem is None else f"{self._guests[link]}: {problem}"
        member = Member.from_json(message["member"])
        if member.token == self._own.token:
            link.send(encode({"members": []}))  # one's own visit
            return None
        self._guests[link] = member
        problem = find_disagreement(self._members())
        if problem is None:
            self._answer({"missing": self._missing_ids()})
        return problem

    def _refuse(self, problem: str) -> None:
        """Tells everybody, also those who come a little later, and raises."""
        subject = problem.split(":")[0]
        end = time.monotonic() + _LINGER_S
        while self._listener is not None and not self._all_came() and time.monotonic() < end:
            found = self._step()
            # The same problem may show in those who come now; any other follows from the end.
            if found is not None and found.split(":")[0] == subject:
                problem = found
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
        self._guests.pop(link)

    def _missing_ids(self) -> list[int]:
        came = {member.process_id for member in self._members()}
        return [number for number in range(self._own.num_processes) if number not in came]

    def _missing(self) -> str:
        return missing_text(self._own.num_processes, self._missing_ids(), self._coordinator)

    def _silent(self) -> str:
        silent = [
            str(member)
            for link, member in self._guests.items()
            if member is not None and link not in self._agreed
        ]
        return f"{', '.join(silent)} did not connect to the other processes in time."

    def _find_who_listens(self) -> str:
        """Why this process cannot listen; another process 0 that listens is informed, too."""
        visit = RendezvousClient(self._coordinator, self._own, time.monotonic() + _VISIT_S)
        try:
            with contextlib.closing(visit):
                visit.meet()
        except ClusterError as error:
            if visit.was_refused:
                return str(error)
        return (
            f"process 0 cannot listen at {self._coordinator}: port {self._coordinator.port} is in "
            "use on this host, by another run or another program. Give all processes a "
            "coordinator with another port."
        )
