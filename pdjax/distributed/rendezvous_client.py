"""The meeting of all processes, as those that are not process 0 see it."""

from __future__ import annotations

import selectors
import socket
import time
from dataclasses import replace

from pdjax.distributed.frames import ForeignError, Link, Message, encode
from pdjax.distributed.members import Address, Member
from pdjax.distributed.rendezvous import RETRY_S, Rendezvous, missing_text, reachable_host
from pdjax.errors import ClusterError

_GRACE_S = 1.0  # process 0, whose deadline may be the same, can say more about it


class RendezvousClient(Rendezvous):
    """The meeting of a process that comes to process 0.

    Attributes:
        was_refused: whether process 0 said that something is wrong.
    """

    def __init__(self, coordinator: Address, own: Member, deadline: float) -> None:
        super().__init__(coordinator, own, deadline)
        self._link: Link | None = None
        self._missing: list[int] = []
        self.was_refused = False

    def meet(self) -> list[Member]:
        """Tells process 0 of this one; hears who there is."""
        message = None
        while message is None:
            self._link = self._connect()
            message = self._introduce(self._link)
        return [Member.from_json(member) for member in message["members"]]

    def look(self) -> None:
        """Hears whether process 0 has ended the meeting."""
        assert self._link is not None, "met before"
        for message in self._link.read(time.monotonic()):
            self._accept(message)
        if self._link.ended is not None:
            raise ClusterError(self._coordinator_ended())

    def agree(self, problem: str | None) -> None:
        """Tells process 0; hears the outcome."""
        assert self._link is not None, "met before"
        self._link.send(encode({"problem": problem}))
        if self._receive(self._link, "agreed") is None:
            raise ClusterError(problem or self._coordinator_ended())

    def give_up(self) -> None:
        """Makes `meet` end soon, which runs in another thread."""
        self._deadline = 0.0

    def close(self) -> None:
        """Closes the connection to process 0."""
        if self._link is not None:
            self._link.close()

    def _connect(self) -> Link:
        """Connects to process 0, which may start later."""
        target = self._coordinator.host, self._coordinator.port
        while True:
            remaining = max(self._deadline - time.monotonic(), RETRY_S)
            try:
                return Link(socket.create_connection(target, remaining))
            except OSError as error:
                if time.monotonic() + RETRY_S > self._deadline:
                    raise ClusterError(self._unreachable(error)) from error
                time.sleep(RETRY_S)

    def _introduce(self, link: Link) -> Message | None:
        """What process 0 answers; None if the one who listens there is not process 0."""
        address = self._own.address
        if not address.host:
            address = replace(address, host=reachable_host(link.own_address))
        link.send(encode({"member": replace(self._own, address=address).to_json()}))
        try:
            answer = self._receive(link, "members")
        except ForeignError:
            answer = None
        if answer is None:
            link.close()
            if self._missing:
                raise ClusterError(self._coordinator_ended())
            if time.monotonic() > self._deadline:
                raise ClusterError(self._foreign())
            time.sleep(RETRY_S)
        return answer

    def _receive(self, link: Link, wanted: str) -> Message | None:
        """The next message that has `wanted`; None if the connection ends before.

        Raises:
            ClusterError: if it is a refusal, or does not come in time.
            ForeignError: if it is no message of pdjax.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(link, selectors.EVENT_READ)
            while link.ended is None:
                remaining = self._deadline + _GRACE_S - time.monotonic()
                if remaining <= 0:
                    raise ClusterError(self._late())
                link.flush()
                selector.select(min(remaining, RETRY_S))
                for message in link.read(time.monotonic()):
                    self._accept(message)
                    if wanted in message:
                        return message
        return None

    def _accept(self, message: Message) -> None:
        if "refused" in message:
            self.was_refused = True
            raise ClusterError(message["refused"])
        self._missing = message.get("missing", self._missing)

    def _unreachable(self, error: OSError) -> str:
        return (
            f"{self._own} could not reach the coordinator at {self._coordinator} in time "
            f"({error}). Is process 0 started, is this the address of its host, and does a "
            "firewall let the port through?"
        )

    def _late(self) -> str:
        if self._missing:
            return missing_text(self._own.num_processes, self._missing, self._coordinator)
        return self._foreign()

    def _foreign(self) -> str:
        return (
            f"{self._own}: what listens at {self._coordinator} does not answer as process 0 of "
            f"pdjax does. Has the run begun already, with all {self._own.num_processes} processes? "
            f"Then another one has the process_id {self._own.process_id}: give each its own. Or "
            "does another program use the port? Then choose another port."
        )

    def _coordinator_ended(self) -> str:
        return (
            f"process 0, the coordinator at {self._coordinator}, ended while the processes were "
            "being brought together; its own output says why."
        )
