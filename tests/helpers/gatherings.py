"""Processes that find each other and talk: here they are threads, without JAX."""

from __future__ import annotations

import contextlib
import queue
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pdjax.distributed.acceptor import Acceptor
from pdjax.distributed.connections import Connections
from pdjax.distributed.frames import Link, encode
from pdjax.distributed.heartbeat import Heartbeat
from pdjax.distributed.members import Address, Member, introduce
from pdjax.distributed.options import StartOptions
from pdjax.distributed.peers import Peers
from pdjax.distributed.rendezvous import listen_for_peers
from pdjax.distributed.rendezvous_client import RendezvousClient
from pdjax.distributed.rendezvous_server import RendezvousServer
from pdjax.distributed.startup import bring_together
from pdjax.errors import ClusterError
from pdjax.launch import free_port

WAIT_S = 20.0  # for what should take milliseconds, on a machine that may be busy
Losses = queue.Queue[str]
GOODBYE = {"kind": "goodbye", "calls": {}}
NOTHING = {"stages": "", "num_minibatches": None}
VERSIONS = {"python": "3.11", "jax": "0.10.2"}


def nothing() -> None:
    """What is done where real processes would do something."""


@dataclass
class Process:
    """What stands for a process: who it is, its links, and what it hears of losses."""

    members: list[Member]
    process_id: int
    links: dict[int, Link]
    acceptor: Acceptor
    losses: Losses = field(default_factory=queue.Queue)

    def watch(self) -> Peers:
        number, on_lost = self.process_id, self.losses.put
        connections = Connections(
            self.members, number, self.links, self.acceptor, on_lost, on_end=nothing
        )
        connections.start()
        return Peers(
            self.members, number, connections, Heartbeat([], b"", 1.0)
        )  # all are in one process

    def say(self, **message) -> None:
        for link in self.links.values():
            link.send(encode(message))

    def crash(self) -> None:
        self.acceptor.close()
        for link in self.links.values():
            link.close()


def come(port, process_id, num_processes, *, timeout_s=WAIT_S, lost_s=30.0, **given) -> Process:
    """One process comes to the meeting."""
    deadline = time.monotonic() + timeout_s
    settings = StartOptions(Address("127.0.0.1", port), num_processes, process_id, lost_s)
    listener = listen_for_peers()
    address = Address("", listener.getsockname()[1])
    versions = given.pop("versions", VERSIONS)
    own = introduce(process_id, num_processes, address, versions, lost_s, **given)
    kind = RendezvousClient if process_id else RendezvousServer
    rendezvous = kind(settings.coordinator, own, deadline)
    acceptor = Acceptor(listener, own.token)
    try:
        members, links = bring_together(rendezvous, settings, acceptor, deadline)
    except ClusterError:
        acceptor.close()
        raise
    return Process(members, process_id, links, acceptor)


def come_all(*processes: dict) -> list[Future[Process]]:
    """Several connect, each with arguments of its own."""
    port = free_port()
    with ThreadPoolExecutor(len(processes)) as pool:
        return [
            pool.submit(come, **{"port": port, "num_processes": len(processes), **given})
            for given in processes
        ]


def refusals(*processes: dict) -> list[str]:
    """With what each of them is refused."""
    found = [future.exception() for future in come_all(*processes)]
    assert all(isinstance(error, ClusterError) for error in found)
    return list(map(str, found))


@contextlib.contextmanager
def run_of(num_processes, *, lost_s=30.0, raw=()) -> Iterator[tuple[list[Any], list[Losses]]]:
    """A run: `Peers` for each process, but the bare `Process` for those in `raw`."""
    given = [{"process_id": number, "lost_s": lost_s} for number in range(num_processes)]
    processes = [future.result() for future in come_all(*given)]
    everyone = [p if p.process_id in raw else p.watch() for p in processes]
    try:
        yield everyone, [p.losses for p in processes]
    finally:
        for process in everyone:
            if isinstance(process, Peers):
                process.leave("test over")
            else:
                process.crash()


def everywhere(everyone: list[Any], work) -> list:
    """Each process does something, at once; returns what each returns or raises."""
    with ThreadPoolExecutor(len(everyone)) as pool:
        futures = [pool.submit(work, peers) for peers in everyone]
        return [future.exception(WAIT_S) or future.result() for future in futures]


def connect(port: int) -> socket.socket:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), WAIT_S)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def wait_until(condition) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


def raised(work, *arguments) -> BaseException | None:
    try:
        work(*arguments)
    except Exception as error:
        return error
    return None
