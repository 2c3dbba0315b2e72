"""A rendezvous through JAX's own store, where JAX knows the processes already."""

from __future__ import annotations

import itertools
import socket
import time
from dataclasses import replace

from pdjax.distributed import jax_client
from pdjax.distributed.members import Address, Member, find_disagreement
from pdjax.distributed.rendezvous import Rendezvous, reachable_host
from pdjax.errors import ClusterError

_meetings = itertools.count()


class StoreRendezvous(Rendezvous):
    """The meeting of processes whose JAX runs already."""

    def __init__(self, coordinator: Address, own: Member, deadline: float) -> None:
        super().__init__(coordinator, own, deadline)
        self._key = f"pdjax/{next(_meetings)}"

    def meet(self) -> list[Member]:
        """Tells and hears who there is."""
        address = replace(self._own.address, host=_own_host(self._coordinator))
        own = replace(self._own, address=address)
        members = [Member.from_json(value) for value in self._exchange("members", own.to_json())]
        problem = find_disagreement(members)
        if problem is not None:
            raise ClusterError(problem)
        return members

    def look(self) -> None:
        """There is nothing to see."""

    def agree(self, problem: str | None) -> None:
        """Tells and hears whether all go on."""
        problems = self._exchange("problems", problem)
        for number, found in enumerate(problems):
            if found is not None:
                raise ClusterError(f"process {number}: {found}")

    def close(self) -> None:
        """Nothing is open."""

    def _exchange(self, about: str, value: object) -> list:
        remaining = max(self._deadline - time.monotonic(), 0.001)
        try:
            return jax_client.exchange(f"{self._key}/{about}", value, remaining)
        except TimeoutError as error:
            raise ClusterError(
                f"{error} did not call pdjax.distributed.initialize in time. JAX was told of it, "
                "so all processes must call it, in the same order."
            ) from error


def _own_host(coordinator: Address) -> str:
    """The address from which this process reaches the coordinator."""
    try:
        found = socket.getaddrinfo(coordinator.host, coordinator.port, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                return reachable_host(probe.getsockname()[0])
    except OSError as error:
        raise ClusterError(
            f"no way to the coordinator's host {coordinator.host}: {error}."
        ) from error
    raise ClusterError(f"no address of the coordinator {coordinator}.")
