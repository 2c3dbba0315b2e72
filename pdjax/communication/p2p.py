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
_NUMBER_BITS, _END_BITS = 24, 14
_GREETING = 2**_NUMBER_BITS - 1
_GREETING_S = 60.0


class End(NamedTuple):
    """Where arrays come from or go to.

    Attributes:
        process: whose device it is.
        sharding: that puts an array on the device.
    """

    process: int
    sharding: Sharding


class Way(NamedTuple):
    """What is sent with one call: the `number`-th from end `source` to end `target`."""

    source: int
    target: int
    number: int


class Wire(Protocol):
    """Sends arrays that have elements. Sender and receiver make their calls in the same order."""

    def send(self, values: Sequence[jax.Array], way: Way) -> None:
        """Sends arrays of this process; they must not be donated before they have arrived."""
        ...

    def receive(self, shapes: Sequence[jax.ShapeDtypeStruct], way: Way) -> Sequence[jax.Array]:
        """Returns what the other side sends, on the device of its target."""
        ...


def find_wire(ends: Sequence[End], peers: Peers, run: int) -> Wire:
    """The way that all these devices support; the same one in every process.

    Args:
        ends: between which arrays travel; the last ones are those of all processes, in order.
        peers: the processes.
        run: a number that no other wire of these processes has.

    Raises:
        ValueError: if there are more ends than can be told apart; if PDJAX_TRANSPORT is set to what
            is not there, to what the devices do not support, or not to the same in all processes.
    """
    if len(ends) > 2**_END_BITS:
        raise ValueError(
            f"{len(ends)} workers and processes; there may be {2**_END_BITS} together."
        )
    wanted = peers.exchange("how arrays travel", _preference(ends))
    if len(set(wanted)) > 1:
        raise ValueError(
            f"the processes prefer different ways for arrays to travel: {wanted}. Use the same "
            f"kind of devices everywhere, or set {VARIABLE}=transfer for all of them."
        )
    if wanted[0] == "device_put":
        return DevicePutWire(ends)
    return TransferWire(ends, peers, run)


def _preference(ends: Sequence[End]) -> str:
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
    kinds = {device.device_kind for end in ends for device in end.sharding.device_set}
    # The keys of such transfers are the same in two processes only if both take part in all.
    processes = {end.process for end in ends}
    simple = len(kinds) == 1 and len(processes) == 2
    return "device_put" if simple and _can_put() else "transfer"


def _can_put() -> bool:
    """Whether `jax.device_put` reaches the devices of other processes."""
    client = jax.local_devices()[0].client
    return bool(getattr(client, "supports_cross_host_transfers", False))


class DevicePutWire:
    """`jax.device_put` to a device of another process, which GPUs and TPUs support.

    Both sides call it: the receiver with an array on the sender's device, of which it has nothing.
    The calls are matched by their order alone, of all that this process sends and receives. Where
    there are three processes XLA does not promise that those of two are matched; it is used then
    only if the environment says so.

    Args:
        ends: between which arrays travel.
    """

    def __init__(self, ends: Sequence[End]) -> None:
        self._ends = ends

    def send(self, values: Sequence[jax.Array], way: Way) -> None:
        """As `Wire.send`."""
        self._put(list(values), way)

    def receive(self, shapes: Sequence[jax.ShapeDtypeStruct], way: Way) -> Sequence[jax.Array]:
        """As `Wire.receive`."""
        source = self._ends[way.source].sharding
        return self._put(
            [
                jax.make_array_from_single_device_arrays(s.shape, source, [], dtype=s.dtype)
                for s in shapes
            ],
            way,
        )

    def _put(self, values: list[jax.Array], way: Way) -> list[jax.Array]:
        return jax.device_put(values, self._ends[way.target].sharding) if values else []


class TransferWire:
    """The servers of `jax.experimental.transfer`, which need nothing of the devices.

    The sender offers arrays under a number, and the receiver fetches them under it.

    Args:
        ends: as for `find_wire`.
        peers: the processes.
        run: a number that no other wire of these processes has.
    """

    def __init__(self, ends: Sequence[End], peers: Peers, run: int) -> None:
        self._ends = ends
        self._run = run % 2 ** (63 - _NUMBER_BITS - 2 * _END_BITS)
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
        own, first = peers.process_id, len(self._ends) - peers.num_processes
        others = [process for process in range(peers.num_processes) if process != own]
        greeting = jax.device_put(np.zeros(1, np.float32), self._ends[first + own].sharding)
        shape = jax.ShapeDtypeStruct(greeting.shape, greeting.dtype)
        for process in others:
            self.send([greeting], Way(first + own, first + process, _GREETING))
        for process in others:
            way = Way(first + process, first + own, _GREETING)
            try:
                _within(_GREETING_S, lambda way=way: self.receive([shape], way)[0].item())
            except (TimeoutError, jax.errors.JaxRuntimeError) as error:
                why = str(error) or "silence"
                raise ClusterError(
                    f"process {own} got nothing from process {process} on {peers.hosts[process]}, "
                    f"which offers arrays at {self._addresses[process]}, within {_GREETING_S:g} s "
                    f"({why}). Every process chooses such a port; does a firewall between the "
                    "hosts let them through?"
                ) from error

    def send(self, values: Sequence[jax.Array], way: Way) -> None:
        """As `Wire.send`."""
        self._server.await_pull(self._name(way), list(values))

    def receive(self, shapes: Sequence[jax.ShapeDtypeStruct], way: Way) -> Sequence[jax.Array]:
        """As `Wire.receive`."""
        process = self._ends[way.source].process
        if process not in self._connections:
            self._connections[process] = self._server.connect(self._addresses[process])
        sharding = self._ends[way.target].sharding
        wanted = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes]
        return self._connections[process].pull(self._name(way), wanted)

    def _name(self, way: Way) -> int:
        """What nothing else on its way has the same of: run, ends and number in 63 bits."""
        name = self._run
        for end in (way.source, way.target):
            name = name << _END_BITS | end
        return name << _NUMBER_BITS | way.number % 2**_NUMBER_BITS


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
