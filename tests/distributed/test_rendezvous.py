"""How processes find each other, and what they are refused for."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from gatherings import (
    GOODBYE,
    VERSIONS,
    WAIT_S,
    come,
    connect,
    nothing,
    raised,
    refusals,
    run_of,
    wait_until,
)

from pdjax.distributed import rendezvous_server as hosting
from pdjax.distributed.acceptor import Acceptor, handshake
from pdjax.distributed.connect import connect_all
from pdjax.distributed.frames import Link, encode
from pdjax.distributed.members import Address, introduce
from pdjax.distributed.options import VARIABLES, device_ids, given_or_environment
from pdjax.distributed.rendezvous import listen_at, listen_for_peers
from pdjax.distributed.rendezvous_client import RendezvousClient
from pdjax.distributed.startup import initialize, is_needed
from pdjax.errors import ClusterError
from pdjax.launch import free_port

# --- coming together


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch):
    for name in VARIABLES.values():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def quick(monkeypatch):
    """Nobody waits long for those who do not come."""
    monkeypatch.setattr(hosting, "_LINGER_S", 0.3)


@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_all_know_all_in_order(num_processes):
    with run_of(num_processes) as (everyone, _):
        for number, peers in enumerate(everyone):
            assert peers.process_id == number
            assert peers.num_processes == num_processes
            assert peers.hosts == (socket.gethostname(),) * num_processes


def test_two_processes_with_one_id():
    found = refusals({"process_id": 0}, {"process_id": 1}, {"process_id": 1})
    assert len(set(found)) == 1
    assert "2 processes have the process_id 1: pid" in found[0]
    assert "Give each its own, from 0 to 2" in found[0]


@pytest.mark.parametrize("num_processes", [2, 3])
def test_two_processes_0_on_one_host(num_processes, quick):
    given = {"process_id": 0, "num_processes": num_processes}
    found = refusals(given, given)
    assert len(set(found)) == 1
    assert "2 processes have the process_id 0" in found[0]


def test_two_processes_0_on_two_hosts(monkeypatch, quick):
    """The other host's process 0 listens at its own address, and finds the first at this one."""
    first = threading.Lock()

    def listen(address):
        return listen_at(address if first.acquire(blocking=False) else Address("127.0.0.2", 0))

    monkeypatch.setattr(hosting, "listen_at", listen)
    found = refusals({"process_id": 0}, {"process_id": 0})
    assert all("2 processes have the process_id 0" in text for text in found)


def test_different_numbers_of_processes():
    found = refusals(
        {"process_id": 0, "num_processes": 3},
        {"process_id": 1, "num_processes": 3},
        {"process_id": 2, "num_processes": 4},
    )
    assert len(set(found)) == 1
    assert "the processes disagree about num_processes: 3 in process 0" in found[0]
    assert "; 4 in process 2" in found[0]


def test_a_process_that_nobody_expects():
    found = refusals(
        {"process_id": 0, "num_processes": 2},
        {"process_id": 2, "num_processes": 3},
    )
    assert all("disagree about num_processes" in text for text in found)


def test_different_versions():
    found = refusals(
        {"process_id": 0, "versions": {"python": "3.11", "jax": "0.10.2"}},
        {"process_id": 1, "versions": {"python": "3.12", "jax": "0.11.2"}},
        {"process_id": 2, "versions": {"python": "3.11"}},
    )
    assert len(set(found)) == 1
    who = [f"process {number} ({socket.gethostname()}, pid" for number in range(3)]
    for line in ("python: 3.11 in process 0", "jax: 0.10.2 in process 0", *who):
        assert line in found[0]
    assert "0.11.2 in process 1" in found[0]
    assert "not installed in process 2" in found[0]


def test_one_that_cannot_take_part_ends_all():
    found = refusals({"process_id": 0}, {"process_id": 1, "problem": "it has no legs"})
    assert len(set(found)) == 1
    assert "process 1" in found[0]
    assert "cannot take part: it has no legs" in found[0]


def test_who_comes_a_little_later_hears_of_the_problem_too():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        first = [pool.submit(come, port, number, 3) for number in (0,)]
        first.append(pool.submit(come, port, 1, 3, versions={"jax": "1"}))
        time.sleep(0.5)
        late = pool.submit(come, port, 2, 3)
        texts = [str(future.exception()) for future in (*first, late)]
    assert all("different versions" in text for text in texts)


def test_nobody_listens_at_the_coordinator():
    port, start = free_port(), time.monotonic()
    with pytest.raises(ClusterError, match=f"could not reach the coordinator at 127.0.0.1:{port}"):
        come(port, 1, 2, timeout_s=0.5)
    assert time.monotonic() - start < 5


def test_another_program_listens_at_the_coordinator():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port} is in use on this host"):
            come(port, 0, 2)

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    with other.accept()[0] as connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(
            ClusterError, match="does not answer as process 0 of pdjax does"
        ) as given:
            come(port, 1, 2, timeout_s=0.5)
        assert "with all 2 processes? Then another one has the process_id 1:" in str(given.value)
        assert "does another program use the port?" in str(given.value)
        other.shutdown(socket.SHUT_RDWR)


def test_one_does_not_come(quick):
    found = refusals(
        {"process_id": 0, "num_processes": 3, "timeout_s": 0.5},
        {"process_id": 2, "num_processes": 3, "timeout_s": 0.5},
    )
    assert all("process 1 of 3 did not come to the coordinator" in text for text in found)


@pytest.mark.parametrize("num_processes", [3, 4])
def test_one_ends_while_the_others_come(num_processes, quick):
    """Before all have come, and after that."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(come, port, number, num_processes) for number in (0, 1)]
        own = introduce(2, num_processes, Address("", 1), VERSIONS, 30.0)
        link = Link(connect(port))
        link.send(encode({"member": own.to_json()}))
        time.sleep(0.2)
        link.close()
        start = time.monotonic()
        texts = [str(future.exception()) for future in waiting]
    assert time.monotonic() - start < 10
    assert all("process 2" in text and "ended while" in text for text in texts)


def test_strangers_are_ignored():
    """Programs that try ports disturb neither the meeting nor the connections after it."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        host = pool.submit(come, port, 0, 2)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"pdjx\x00\x00\x00\x02{}", b"pd", b""):
            with connect(port) as stranger:
                stranger.sendall(words)
        silent = connect(port)
        client = pool.submit(come, port, 1, 2)
        for process in (host.result(), client.result()):
            assert len(process.members) == 2
            process.crash()
        silent.close()


def test_only_who_knows_the_token_is_let_in():
    listener = listen_for_peers()
    port = listener.getsockname()[1]
    members = [introduce(n, 2, Address("127.0.0.1", port), VERSIONS, 30.0) for n in range(2)]
    stranger, friend, heartbeat = (Link(connect(port)) for _ in range(3))
    stranger.send(encode({"hello": 1, "token": "guessed", "is_heartbeat": False}))
    heartbeat.send(handshake(1, members[0], is_heartbeat=True))
    friend.send(handshake(1, members[0]))
    acceptor = Acceptor(listener, members[0].token)
    links = connect_all(members, 0, "127.0.0.1", acceptor, time.monotonic() + WAIT_S, nothing)
    acceptor.admit(0.1)
    assert list(acceptor.heartbeats) == [1]
    friend.send(encode(GOODBYE))
    wait_until(lambda: links[1].read(0.0) == [GOODBYE])
    for link in (stranger, friend, heartbeat, links[1], acceptor):
        link.close()


def test_no_way_between_two_that_are_not_the_coordinator():
    """All end with the reason, which only one of them sees."""
    port = free_port()
    closed = free_port()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(come, port, 0, 3, timeout_s=3)
        last = pool.submit(come, port, 2, 3, timeout_s=1)
        own = introduce(1, 3, Address("", closed), VERSIONS, 30.0)
        client = RendezvousClient(Address("127.0.0.1", port), own, time.monotonic() + WAIT_S)
        client.meet()
        wait_until(lambda: isinstance(raised(client.look), ClusterError))
        for future in (first, last):
            assert f"no connection to process 1 ({socket.gethostname()}" in str(future.exception())
        client.close()


# --- arguments


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("node0:1234", "node0", 1234), ("10.0.0.1:1", "10.0.0.1", 1), ("[::1]:65535", "::1", 65535)],
)
def test_addresses(text, host, port):
    assert Address.parse(text) == Address(host, port)
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "node0", ":1234", "node0:", "node0:0", "node0:65536", "node0:x", "::1:1234", "[::1]",
     "http://node0:1234", "no de:1", "node0:-1", "node0:١"],
)  # fmt: skip
def test_malformed_addresses(text):
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        Address.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "h:1"}, r"got coordinator h:1, but no num_processes \(or PDJAX_NUM_PROC"),
        ({"process_id": 0}, "no coordinator"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process_id 2: expected"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": -1}, "process_id -1: expected"),
        ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "num_processes 0"),
        ({"coordinator": "h:1", "num_processes": 2.0, "process_id": 0}, "num_processes 2.0"),
        ({"coordinator": "h", "num_processes": 2, "process_id": 0}, "expected HOST:PORT"),
        ({}, "nothing says which processes there are"),
        ({"timeout_s": 0}, "timeout_s 0"),
        ({"lost_peer_timeout_s": 0.5}, "lost_peer_timeout_s 0.5: expected at least 1"),
        ({"local_device_ids": [0, 0]}, "local_device_ids"),
        ({"local_device_ids": "a"}, "local_device_ids"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        initialize(**arguments)


def test_what_is_not_given_is_read_from_the_environment(monkeypatch):
    assert given_or_environment(None, None, None) is None
    monkeypatch.setenv("PDJAX_COORDINATOR", "h:1")
    monkeypatch.setenv("PDJAX_NUM_PROCESSES", "4")
    with pytest.raises(ValueError, match=r"no process_id \(or PDJAX_PROCESS_ID\)"):
        is_needed()
    monkeypatch.setenv("PDJAX_PROCESS_ID", "3")
    assert is_needed()
    assert given_or_environment(None, None, None) == (Address("h", 1), 4, 3)
    assert given_or_environment("g:2", None, 0) == (Address("g", 2), 4, 0)
    monkeypatch.setenv("PDJAX_PROCESS_ID", "three")
    with pytest.raises(ValueError, match="process_id 'three': expected a whole number"):
        is_needed()


def test_device_ids():
    assert device_ids(None) is None
    assert device_ids(3) == (3,)
    assert device_ids([1, 0]) == (1, 0)
