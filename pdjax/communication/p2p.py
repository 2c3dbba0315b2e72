"""How arrays get from a device of one process to a device of another.

Both ways return at once on either side: what is received becomes ready when it has come, and is
asked for as soon as the program that reads it is dispatched, long before that runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import transfer
from jax.sharding import Sharding

from pdjax.distributed import Peers
from pdjax.errors import ClusterError

VARIABLE = "PDJAX_TRANSPORT"
_NUMBER_BITS, _ENDPOINT_BITS = 24, 14
_GREETING = 2**_NUMBER_BITS - 1
_GREETING_S = 60.0


class Endpoint(NamedTuple):
    """Where arrays come from or go to.

    Attributes:
        process: whose device it is.
        sharding: that puts an array on the device.
    """

    process: int
    sharding: Sharding


class Tag(NamedTuple):
    """What is sent with one call: the `number`-th from endpoint `source` to endpoint `target`."""

    source: int
    target: int
    number: int


class Backend(Protocol):
    """Sends arrays that have elements. Sender and receiver make their calls in the same order."""

    def send(self, values: Sequence[jax.Array], tag: Tag) -> None:
        """Sends arrays of this process; they must not be donated before they have arrived."""
        ...

    def receive(self, shapes: Sequence[jax.ShapeDtypeStruct], tag: Tag) -> Sequence[jax.Array]:
        """Returns what the other side sends, on the device of its target."""
        ...


def find_backend(endpoints: Sequence[Endpoint], peers: Peers, run: int) -> Backend:
    """The backend that all these devices support; the same one in every process.

    Args:
        endpoints: between which arrays travel; the last ones are those of all processes, in order.
        peers: the processes.
        run: a number that no other backend of these processes has.

    Raises:
        ValueError: if there are more endpoints than can be told apart; if PDJAX_TRANSPORT is set to
            what is not there, to what the devices do not support, or not to the same in all
            processes.
    """
    if len(endpoints) > 2**_ENDPOINT_BITS:
        raise ValueError(
            f"{len(endpoints)} workers and processes; there may be {2**_ENDPOINT_BITS} together."
        )
    wanted = peers.exchange("how arrays travel", _preference(endpoints))
    if len(set(wanted)) > 1:
        raise ValueError(
            f"the processes prefer different ways for arrays to travel: {wanted}. Use the same "
            f"kind of devices everywhere, or set {VARIABLE}=transfer for all of them."
        )
    if wanted[0] == "device_put":
        return DevicePutBackend(endpoints)
    return TransferBackend(endpoints, peers, run)


def _preference(endpoints: Sequence[Endpoint]) -> str:
    chosen = os.environ.get(VARIABLE, "")
    if chosen == "device_put" and not _can_put():
        raise ValueError(
            f"{VARIABLE}={chosen!r} in the environment, but the devices of this process "
            f"({jax.local_devices()[0].device_kind}) cannot send arrays to those of others; "
            "expected GPUs or TPUs. Set it to 'transfer', or leave it out."
        )
    if chosen in ("device_put", "transfer"):
        return chosen
    if chosen:
        raise ValueError(
            f"{VARIABLE}={chosen!r} in the environment; expected 'device_put' or 'transfer', or "
            "nothing for what the devices support."
        )
    kinds = {
        device.device_kind for endpoint in endpoints for device in endpoint.sharding.device_set
    }
    # The keys of such transfers are the same in two processes only if both take part in all.
    processes = {endpoint.process for endpoint in endpoints}
    simple = len(kinds) == 1 and len(processes) == 2
    return "device_put" if simple and _can_put() else "transfer"


def _can_put() -> bool:
    """Whether `jax.device_put` reaches the devices of other processes."""
    client = jax.local_devices()[0].client
    return bool(getattr(client, "supports_cross_host_transfers", False))


class DevicePutBackend:
    """`jax.device_put` to a device of another process, which GPUs and TPUs support.

    Both sides call it: the receiver with an array on the sender's device, of which it has nothing.
    The calls are matched by their order alone, of all that this process sends and receives. Where
    there are three processes XLA does not promise that those of two are matched; it is used then
    only if the environment says so.

    Args:
        endpoints: between which arrays travel.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = endpoints

    def send(self, values: Sequence[jax.Array], tag: Tag) -> None:
        """As `Backend.send`."""
        self._put(list(values), tag)

    def receive(self, shapes: Sequence[jax.ShapeDtypeStruct], tag: Tag) -> Sequence[jax.Array]:
        """As `Backend.receive`."""
        source = self._endpoints[tag.source].sharding
        return self._put(
            [
                jax.make_array_from_single_device_arrays(s.shape, source, [], dtype=s.dtype)
                for s in shapes
            ],
            tag,
        )

    def _put(self, values: list[jax.Array], tag: Tag) -> list[jax.Array]:
        return jax.device_put(values, self._endpoints[tag.target].sharding) if values else []


class TransferBackend:
    """The servers of `jax.experimental.transfer`, which need nothing of the devices.

    The sender offers arrays under a number, and the receiver fetches them under it.

    Args:
        endpoints: as for `find_backend`.
        peers: the processes.
        run: a number that no other backend of these processes has.
    """

    def __init__(self, endpoints: Sequence[Endpoint], peers: Peers, run: int) -> None:
        self._endpoints = endpoints
        self._run = run % 2 ** (63 - _NUMBER_BITS - 2 * _ENDPOINT_BITS)
        self._server = _server(peers.address)
        self._addresses = peers.exchange("address for transfers", self._server.address())
        self._connections: dict[int, Any] = {}
        self._greet(peers)

    def _greet(self, peers: Peers) -> None:
        """Opens the connections between all processes, before there is anything to wait for.

        So that one that cannot be opened is told of, and none is opened while the links are full.

        Raises:
            ClusterError: if nothing comes from a process in time.
        """
        own, first = peers.process_id, len(self._endpoints) - peers.num_processes
        others = [process for process in range(peers.num_processes) if process != own]
        greeting = jax.device_put(np.zeros(1, np.float32), self._endpoints[first + own].sharding)
        shape = jax.ShapeDtypeStruct(greeting.shape, greeting.dtype)
        for process in others:
            self.send([greeting], Tag(first + own, first + process, _GREETING))
        for process in others:
            tag = Tag(first + process, first + own, _GREETING)
            try:
                _within(_GREETING_S, lambda tag=tag: self.receive([shape], tag)[0].item())
            except (TimeoutError, jax.errors.JaxRuntimeError) as error:
                why = str(error) or "silence"
                raise ClusterError(
                    f"process {own} got nothing from process {process} on {peers.hosts[process]}, "
                    f"which offers arrays at {self._addresses[process]}, within {_GREETING_S:g} s "
                    f"({why}). Every process chooses such a port; does a firewall between the "
                    "hosts let them through?"
                ) from error

    def send(self, values: Sequence[jax.Array], tag: Tag) -> None:
        """As `Backend.send`."""
        self._server.await_pull(self._name(tag), list(values))

    def receive(self, shapes: Sequence[jax.ShapeDtypeStruct], tag: Tag) -> Sequence[jax.Array]:
        """As `Backend.receive`."""
        process = self._endpoints[tag.source].process
        if process not in self._connections:
            self._connections[process] = self._server.connect(self._addresses[process])
        sharding = self._endpoints[tag.target].sharding
        wanted = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes]
        return self._connections[process].pull(self._name(tag), wanted)

    def _name(self, tag: Tag) -> int:
        """A number of its own for each tag: run, both endpoints and number in 63 bits."""
        name = self._run
        for endpoint in (tag.source, tag.target):
            name = name << _ENDPOINT_BITS | endpoint
        return name << _NUMBER_BITS | tag.number % 2**_NUMBER_BITS


def _within(seconds: float, work: Callable[[], Any]) -> None:
    """Does something that may never return.

    Raises:
        TimeoutError: if it does not in time.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    done.result(seconds)


@cache
def _server(address: str) -> Any:
    """The server of this process; there is one for all pipelines."""
    client = jax.local_devices()[0].client
    host = f"[{address}]:0" if ":" in address else f"{address}:0"
    return transfer.start_transfer_server(client, host, [host], **_how_to_copy(client.platform))


def _how_to_copy(platform: str) -> dict[str, Any]:
    """How a server reads arrays that it sends.

    On a CPU it would leave that to the threads that compute, with one core to the only one: what is
    asked for while a program runs is sent when that has ended. It does so for what is asked for
    before, too, beyond 8 arrays or parts of arrays at once. With raw buffers it reads by itself.
    """
    if platform != "cpu":
        return {}
    return {"use_raw_buffers": True, "max_num_parallel_copies": 64, "transfer_size": 2**20}
