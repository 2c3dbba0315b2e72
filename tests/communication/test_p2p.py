"""How arrays get from one process to another: which way is chosen, and what is waited for."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from pdjax.communication import p2p, remote
from pdjax.errors import ClusterError


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("device_put", r"devices of this process \(cpu\) cannot send .* Set it to 'transfer'"),
        ("pigeon", "PDJAX_TRANSPORT='pigeon' in the environment; expected 'device_put' or"),
    ],
)
def test_a_way_to_travel_that_is_not_there(value, message, monkeypatch):
    monkeypatch.setenv(p2p.VARIABLE, value)
    peers: Any = SimpleNamespace(exchange=None)  # it is refused before anybody is asked
    with pytest.raises(ValueError, match=message):
        p2p.find_backend([], peers, 0)


class Slow:
    """An array that is on its way until it is told to have come."""

    def __init__(self):
        self.has_come, self.was_awaited = False, False

    def is_ready(self):
        return self.has_come

    def is_deleted(self):
        return False

    def block_until_ready(self):
        self.was_awaited = True


def test_what_is_on_its_way_is_awaited_and_nothing_else_is_held():
    arrivals, first, second, third = remote.Arrivals(), Slow(), Slow(), Slow()
    gone = jax.device_put(1.0)
    gone.delete()
    arrivals.add(cast(Any, [first, second]))
    first.has_come = True
    arrivals.add(cast(Any, [third, gone]))
    arrivals.wait()
    assert [one.was_awaited for one in (first, second, third)] == [False, True, True]
    second.was_awaited = False
    arrivals.wait()
    assert not second.was_awaited


@pytest.mark.parametrize(("num_processes", "expected"), [(2, "device_put"), (3, "transfer")])
def test_device_put_is_chosen_between_two_processes(num_processes, expected, monkeypatch):
    """Where there are more XLA promises nothing, since each takes part in some transfers only."""
    monkeypatch.delenv(p2p.VARIABLE, raising=False)
    monkeypatch.setattr(p2p, "_can_put", lambda: True)
    place = SingleDeviceSharding(jax.devices()[0])
    ends = [p2p.Endpoint(number, place) for number in (0, *range(num_processes))]
    asked = []

    def exchange(about, mine):
        asked.append(mine)
        raise StopIteration

    peers: Any = SimpleNamespace(exchange=exchange)
    with pytest.raises(StopIteration):
        p2p.find_backend(ends, peers, 0)
    assert asked == [expected]


@pytest.mark.parametrize("trouble", ["silence", "no way"])
def test_arrays_that_cannot_get_through_are_noticed_at_once(trouble, monkeypatch):
    """The ports for them are others than those over which the processes met."""
    done = threading.Event()

    def pull(name, shapes):
        if trouble == "silence":
            done.wait(20)
        raise jax.errors.JaxRuntimeError("no way")

    server = SimpleNamespace(
        address=lambda: "here:1",
        await_pull=lambda *_: None,
        connect=lambda address: SimpleNamespace(pull=pull),
    )
    monkeypatch.setattr(p2p, "_server", lambda address: server)
    monkeypatch.setattr(p2p, "_GREETING_S", 0.2)
    place = SingleDeviceSharding(jax.devices()[0])
    ends = [p2p.Endpoint(number, place) for number in (0, 1)]
    peers: Any = SimpleNamespace(
        process_id=0,
        num_processes=2,
        hosts=("one", "other"),
        address="here",
        exchange=lambda about, mine: [mine, "there:2"],
    )
    text = rf"nothing from process 1 on other, .* at there:2, within 0.2 s \({trouble}\)"
    with pytest.raises(ClusterError, match=text):
        p2p.TransferBackend(ends, peers, 0)
    done.set()
