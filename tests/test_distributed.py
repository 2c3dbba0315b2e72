"""Processes that find each other, talk, and are lost: here they are threads, without JAX."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdjax.distributed import host as hosting
from pdjax.distributed.connecting import connect_all
from pdjax.distributed.door import Door, greeting
from pdjax.distributed.ending import EndOfProgram
from pdjax.distributed.frames import ForeignError, Link, encode
from pdjax.distributed.guest import Guest
from pdjax.distributed.host import Host
from pdjax.distributed.members import Address, Member, introduce
from pdjax.distributed.mesh import Mesh
from pdjax.distributed.peers import Peers
from pdjax.distributed.pulse import Pulse
from pdjax.distributed.relay import Relay
from pdjax.distributed.rendezvous import listen_at, listen_for_peers
from pdjax.distributed.settings import VARIABLES, Settings, device_ids, given_or_environment
from pdjax.distributed.silence import Silence
from pdjax.distributed.starting import bring_together, initialize, is_needed
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
    door: Door
    losses: Losses = field(default_factory=queue.Queue)

    def watch(self) -> Peers:
        number, on_lost = self.process_id, self.losses.put
        mesh = Mesh(self.members, number, self.links, self.door, on_lost, on_end=nothing)
        mesh.start()
        return Peers(self.members, number, mesh, Pulse([], b"", 1.0))  # all are in one process

    def say(self, **message) -> None:
        for link in self.links.values():
            link.send(encode(message))

    def crash(self) -> None:
        self.door.close()
        for link in self.links.values():
            link.close()


def come(port, process_id, num_processes, *, timeout_s=WAIT_S, lost_s=30.0, **told) -> Process:
    """One process comes to the meeting."""
    deadline = time.monotonic() + timeout_s
    settings = Settings(Address("127.0.0.1", port), num_processes, process_id, lost_s)
    listener = listen_for_peers()
    address = Address("", listener.getsockname()[1])
    versions = told.pop("versions", VERSIONS)
    own = introduce(process_id, num_processes, address, versions, lost_s, **told)
    kind = Guest if process_id else Host
    rendezvous = kind(settings.coordinator, own, deadline)
    door = Door(listener, own.token)
    try:
        members, links = bring_together(rendezvous, settings, door, deadline)
    except ClusterError:
        door.close()
        raise
    return Process(members, process_id, links, door)


def come_all(*processes: dict) -> list[Future[Process]]:
    """Several come, each told something of its own."""
    port = free_port()
    with ThreadPoolExecutor(len(processes)) as pool:
        return [
            pool.submit(come, **{"port": port, "num_processes": len(processes), **told})
            for told in processes
        ]


def refusals(*processes: dict) -> list[str]:
    """With what each of them is refused."""
    found = [future.exception() for future in come_all(*processes)]
    assert all(isinstance(error, ClusterError) for error in found)
    return list(map(str, found))


@contextlib.contextmanager
def run_of(num_processes, *, lost_s=30.0, raw=()) -> Iterator[tuple[list[Any], list[Losses]]]:
    """A run: `Peers` for each process, but the bare `Process` for those in `raw`."""
    told = [{"process_id": number, "lost_s": lost_s} for number in range(num_processes)]
    processes = [future.result() for future in come_all(*told)]
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
    told = {"process_id": 0, "num_processes": num_processes}
    found = refusals(told, told)
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
        ) as told:
            come(port, 1, 2, timeout_s=0.5)
        assert "with all 2 processes? Then another one has the process_id 1:" in str(told.value)
        assert "does another program use the port?" in str(told.value)
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


def connect(port: int) -> socket.socket:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), WAIT_S)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_strangers_are_ignored():
    """Programs that try ports disturb neither the meeting nor the connections after it."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        host = pool.submit(come, port, 0, 2)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"pdjx\x00\x00\x00\x02{}", b"pd", b""):
            with connect(port) as stranger:
                stranger.sendall(words)
        silent = connect(port)
        guest = pool.submit(come, port, 1, 2)
        for process in (host.result(), guest.result()):
            assert len(process.members) == 2
            process.crash()
        silent.close()


def test_only_who_knows_the_token_is_let_in():
    listener = listen_for_peers()
    port = listener.getsockname()[1]
    members = [introduce(n, 2, Address("127.0.0.1", port), VERSIONS, 30.0) for n in range(2)]
    stranger, friend, pulse = (Link(connect(port)) for _ in range(3))
    stranger.send(encode({"hello": 1, "token": "guessed", "is_pulse": False}))
    pulse.send(greeting(1, members[0], is_pulse=True))
    friend.send(greeting(1, members[0]))
    door = Door(listener, members[0].token)
    links = connect_all(members, 0, "127.0.0.1", door, time.monotonic() + WAIT_S, nothing)
    door.admit(0.1)
    assert list(door.pulses) == [1]
    friend.send(encode(GOODBYE))
    wait_until(lambda: links[1].read(0.0) == [GOODBYE])
    for link in (stranger, friend, pulse, links[1], door):
        link.close()


def test_no_way_between_two_that_are_not_the_coordinator():
    """All end with the reason, which only one of them sees."""
    port = free_port()
    closed = free_port()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(come, port, 0, 3, timeout_s=3)
        last = pool.submit(come, port, 2, 3, timeout_s=1)
        own = introduce(1, 3, Address("", closed), VERSIONS, 30.0)
        guest = Guest(Address("127.0.0.1", port), own, time.monotonic() + WAIT_S)
        guest.meet()
        wait_until(lambda: isinstance(raised(guest.look), ClusterError))
        for future in (first, last):
            assert f"no connection to process 1 ({socket.gethostname()}" in str(future.exception())
        guest.close()


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


# --- talking


def test_values_come_in_order_of_process():
    with run_of(4) as (everyone, _):
        for turn in range(20):
            found = everywhere(
                everyone, lambda p, turn=turn: p.exchange(f"turn {turn}", (p.process_id, turn))
            )
            assert found == [[[number, turn] for number in range(4)]] * 4


def test_an_exchange_is_a_barrier():
    with run_of(2) as (everyone, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(everyone[0].exchange, "plan", 1)
        time.sleep(0.1)
        assert not waiting.done()
        assert everyone[1].exchange("plan", 2) == [1, 2]
        assert waiting.result(WAIT_S) == [1, 2]


def test_processes_at_different_places():
    with run_of(3) as (everyone, losses):
        found = everywhere(everyone, lambda p: p.exchange("plan" if p.process_id else "seed", 1))
        for error in found:
            assert isinstance(error, ClusterError)
            assert "'seed' in process 0; 'plan' in process 1, 2" in str(error)
        assert all(heard.empty() for heard in losses)


def test_a_value_that_json_has_no_form_for():
    with run_of(2) as (everyone, _):
        for value in (object(), {1: 2, (1, 2): 3}, b"bytes"):
            with pytest.raises(ValueError, match="cannot exchange 'plan': expected what JSON has"):
                everyone[0].exchange("plan", value)
        assert everywhere(everyone, lambda p: p.exchange("plan", None)) == [[None, None]] * 2


def test_a_large_value():
    text = "0123456789" * 500_000
    with run_of(3) as (everyone, _):
        found = everywhere(everyone, lambda p: p.exchange("text", text + str(p.process_id)))
        assert found == [[text + str(number) for number in range(3)]] * 3


def test_a_value_that_is_too_large_leaves_the_turn_as_it_was(monkeypatch):
    monkeypatch.setattr("pdjax.distributed.frames._MAX_BYTES", 1000)
    with run_of(2) as (everyone, _):
        with pytest.raises(ValueError, match="expected at most 1,000"):
            everyone[0].exchange("text", "x" * 1000)
        assert everywhere(everyone, lambda p: p.exchange("text", 1)) == [[1, 1]] * 2


def test_several_threads_exchange():
    def many(peers: Peers) -> list:
        with ThreadPoolExecutor(4) as pool:
            values = [f"{peers.process_id}.{n}" for n in range(40)]
            return sorted(map(tuple, pool.map(lambda value: peers.exchange("it", value), values)))

    with run_of(2) as (everyone, _):
        found = everywhere(everyone, many)
        assert found[0] == found[1]
        assert len({first for first, _ in found[0]}) == 40


# --- ending well


def test_ending_at_different_times_is_no_loss():
    with run_of(3) as (everyone, losses), ThreadPoolExecutor(3) as pool:
        everyone[2].completed(5)
        first = pool.submit(everyone[2].close)
        wait_until(lambda: everyone[0].ended() == {2: 5})
        assert not first.done()
        rest = [pool.submit(peers.close) for peers in everyone[:2]]
        for future in (first, *rest):
            future.result(WAIT_S)
        assert all(heard.empty() for heard in losses)


def test_ending_at_the_same_time_is_no_loss():
    for _ in range(30):
        with run_of(3) as (everyone, losses):
            start = time.monotonic()
            assert everywhere(everyone, Peers.close) == [None] * 3
            assert time.monotonic() - start < 5
            assert all(heard.empty() for heard in losses)


def test_an_end_of_connection_after_a_goodbye_is_no_loss():
    with run_of(3, raw=[2]) as (everyone, losses):
        gone = everyone.pop()
        gone.say(**GOODBYE)
        gone.crash()
        wait_until(lambda: all(2 not in peers._mesh._links for peers in everyone))
        time.sleep(0.1)
        assert all(heard.empty() for heard in losses)
        everywhere(everyone, Peers.close)


def test_the_goodbye_is_not_lost_though_the_others_still_talk():
    """A connection that is closed while something comes is reset, and the last words with it."""
    with run_of(2, raw=[1]) as (everyone, _), ThreadPoolExecutor(1) as pool:
        everyone[1].say(**GOODBYE)
        closing = pool.submit(everyone[0].close)
        link = everyone[1].links[0]
        heard = []
        wait_until(lambda: heard.extend(link.read(0.0)) or link.ended)
        assert GOODBYE in heard
        for _ in range(10):  # it is still listened to
            assert link._socket.send(encode({"kind": "alive", "num_minibatches": 1}))
            time.sleep(0.01)
        everyone[1].crash()
        closing.result(WAIT_S)


def test_what_is_to_be_finished_is_finished_before_the_goodbye():
    with run_of(2) as (everyone, losses), ThreadPoolExecutor(2) as pool:
        is_done, calls = threading.Event(), []

        def finish():
            calls.append(is_done.wait(WAIT_S))

        everyone[0].finish_first(finish)
        everyone[0].finish_first(finish)
        closing = [pool.submit(peers.close) for peers in everyone]
        time.sleep(0.1)
        assert everyone[1].ended() == {}
        is_done.set()
        for future in closing:
            future.result(WAIT_S)
        everyone[0].close()
        assert calls == [True]
        assert all(heard.empty() for heard in losses)


def test_no_exchange_with_one_that_has_ended():
    with run_of(2, raw=[1]) as (everyone, losses), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(everyone[0].exchange, "plan", 1)
        everyone[1].say(**GOODBYE)
        for error in (waiting.exception(WAIT_S), raised(everyone[0].exchange, "seed", 1)):
            assert isinstance(error, ClusterError)
            assert "process 1" in str(error)
            assert "has ended already" in str(error)
        assert losses[0].empty()


def test_who_makes_more_calls_than_one_that_has_ended():
    """Neither ends otherwise: each would wait for the other."""
    with ThreadPoolExecutor(1) as pool, run_of(3) as (everyone, losses):
        for peers in everyone:
            make(peers, "evaluate", "step", "step")
        closing = pool.submit(everyone[1].close)
        wait_until(lambda: all(1 in everyone[number].ended() for number in (0, 2)))
        for call, counted in (("step", "2 calls"), ("evaluate", "1 call"), ("params", "no calls")):
            error = raised(make, everyone[0], call)
            assert isinstance(error, ClusterError)
            assert str(error).startswith(f"process 1 ({socket.gethostname()}, pid ")
            assert f"has ended after {counted} of Pipeline.{call}, while process 0" in str(error)
        everywhere([everyone[0], everyone[2]], Peers.close)
        closing.result(WAIT_S)
        assert all(heard.empty() for heard in losses)


@pytest.mark.parametrize("has_closed", [False, True])
def test_one_ends_while_another_is_ahead(has_closed):
    """The other may be blocked in that call, or wait at its end already."""
    with ThreadPoolExecutor(2) as pool, run_of(3) as (everyone, losses):
        everyone[2].describe("stage 2: head")
        for peers in everyone:
            make(peers, "step")
        make(everyone[0], "step")
        if has_closed:
            pool.submit(everyone[0].close)
            wait_until(lambda: 0 in everyone[2].ended())
        pool.submit(everyone[2].close)
        text = losses[0].get(timeout=WAIT_S)
        assert text.startswith("error: process 2 (")
        assert ", stage 2: head, has ended after 1 call of Pipeline.step, while process 0" in text
        assert "is at call 2; all must make the same calls, so give every process" in text
        assert "process 2" in losses[1].get(timeout=WAIT_S)


def test_a_call_that_failed_does_not_count():
    with run_of(2) as (everyone, losses):
        with pytest.raises(KeyError), everyone[0].taking_part("step"):
            raise KeyError
        assert everywhere(everyone, Peers.close) == [None] * 2
        assert all(heard.empty() for heard in losses)


def make(peers: Peers, *calls: str) -> None:
    for call in calls:
        with peers.taking_part(call):
            pass


def test_no_exchange_after_the_end():
    with run_of(1) as (everyone, _):
        everyone[0].close()
        everyone[0].close()
        everyone[0].fail("too late")
        assert not everyone[0].has_failed
        with pytest.raises(ClusterError, match="this process has left the run"):
            everyone[0].exchange("plan", 1)


# --- losses


def test_a_crash_is_noticed_at_once():
    with run_of(3, raw=[1]) as (everyone, losses):
        everyone[1].say(kind="stages", stages="stage 1: block_2 … head")
        everyone[1].say(kind="alive", num_minibatches=41)
        everyone[0].describe("stage 0: embed … block_1")
        everyone[0].completed(43)
        everyone[1].crash()
        text = losses[0].get(timeout=WAIT_S)
        host = socket.gethostname()
        assert text.startswith(f"error: process 1 ({host}, pid ")
        assert "), stage 1: block_2 … head, was killed or crashed: its connection ended" in text
        assert "It had completed 41 minibatches; this process 0" in text
        assert "), stage 0: embed … block_1, had completed 43 minibatches." in text
        assert "process 1" in losses[2].get(timeout=WAIT_S)
        assert losses[0].empty()


def test_who_waits_for_a_value_hears_of_the_loss():
    with run_of(2, raw=[1]) as (everyone, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(everyone[0].exchange, "plan", 1)
        everyone[1].crash()
        assert "was killed or crashed" in str(waiting.exception(WAIT_S))


def test_silence_is_noticed_in_time():
    """Process 1 keeps its connections, but says nothing."""
    with run_of(3, raw=[1], lost_s=1.5) as (everyone, losses):
        start = time.monotonic()
        texts = [losses[number].get(timeout=WAIT_S) for number in (0, 2)]
        assert 1.0 < time.monotonic() - start < 1.5
        for text in texts:
            assert "process 1" in text
            assert "it hangs or is stopped, or its host or the network is down" in text
        assert isinstance(everyone[1], Process)


def test_who_hears_nobody_may_be_cut_off_itself():
    with run_of(3, raw=[0, 2], lost_s=1.0) as (everyone, losses):
        text = losses[1].get(timeout=WAIT_S)
        assert "was not heard for" in text
        assert f"nor was any other by process 1, so its own host {socket.gethostname()}" in text
        assert isinstance(everyone[0], Process)


def test_a_process_that_runs_no_python_at_all_is_lost_in_the_end():
    own = introduce(0, 2, Address("", 1), VERSIONS, 10.0)
    near, far = tcp_pair()
    link, pulse = Link(near), Link(far)
    silence = Silence(own)
    pulse.heard_at = 100.0
    assert silence.find_lost({1: link}, {1: pulse}, 101.0) is None
    pulse.heard_at = 121.0
    lost = silence.find_lost({1: link}, {1: pulse}, 121.0)
    assert lost is not None
    assert lost.reason == "hangs: it has run no Python for 121 s"
    link.close()
    pulse.close()


def test_no_false_alarm():
    with run_of(3, lost_s=1.0) as (everyone, losses):
        time.sleep(2.5)
        assert all(heard.empty() for heard in losses)
        assert everywhere(everyone, lambda p: p.exchange("still here", 1)) == [[1, 1, 1]] * 3


def test_the_impatient_is_beaten_for_by_the_patient():
    told = [{"process_id": 0, "lost_s": 1.0}, {"process_id": 1, "lost_s": 600.0}]
    processes = [future.result() for future in come_all(*told)]
    everyone = [process.watch() for process in processes]
    time.sleep(1.5)
    assert all(process.losses.empty() for process in processes)
    everywhere(everyone, Peers.close)


def test_all_name_the_first_cause():
    """Process 2 sees nothing of the crash itself, and then process 0 ends, too."""
    with run_of(3, raw=[1]) as (everyone, losses):
        still_open = everyone[1].links.pop(2)
        everyone[1].say(kind="stages", stages="stage 1: head")
        everyone[1].say(kind="alive", num_minibatches=41)
        everyone[1].crash()
        for number in (0, 2):
            text = losses[number].get(timeout=WAIT_S)
            assert text.startswith("error: process 1 ")
            assert ", stage 1: head, was killed" in text
            assert "It had completed 41 minibatches" in text
        assert "(noticed by process 0)" in text
        assert losses[2].empty()
        still_open.close()


def test_a_failure_is_told():
    with run_of(3) as (everyone, losses):
        everyone[1].completed(1)
        everyone[1].fail("ValueError: the batch is empty")
        for number in (0, 2):
            text = losses[number].get(timeout=WAIT_S)
            assert "process 1" in text
            assert "failed: ValueError: the batch is empty" in text
            assert "It had completed 1 minibatch; this process" in text
        assert everyone[1].has_failed
        assert losses[1].empty()


@pytest.mark.parametrize(("hook_s", "expected"), [(0, "said, told"), (1.5, "told, said, told")])
def test_a_traceback_comes_before_the_others_hear_of_it_unless_it_takes_long(hook_s, expected):
    """As soon as they have ended, a launcher ends this process, too."""
    done: list[str] = []

    class Others:
        def loss_follows(self) -> bool:
            return False

        def leave(self, reason: str) -> None:
            assert reason == "failed: ValueError: bad"
            done.append("told")

    others: Any = Others()
    end = EndOfProgram(others, catch_sigterm=False)
    end._hook = lambda *_: (time.sleep(hook_s), done.append("said"))
    end._on_exception(ValueError, ValueError("bad"), None)
    assert ", ".join(done) == expected


def test_a_failure_that_follows_from_a_loss_is_not_told():
    with run_of(3, raw=[1]) as (everyone, losses):
        everyone[1].crash()
        everyone[0].fail("JaxRuntimeError: Connection closed")
        assert not everyone[0].has_failed
        for number in (0, 2):
            assert "process 1" in losses[number].get(timeout=WAIT_S)


def test_who_was_given_up_ends_too():
    """Process 0 was stopped, say, and goes on."""
    with run_of(2, raw=[1]) as (everyone, losses):
        everyone[1].say(kind="lost", process_id=0, reason="was silent", **NOTHING)
        everyone[1].crash()
        text = losses[0].get(timeout=WAIT_S)
        assert text.startswith("error: this process 0")
        assert "was given up by process 1: it was silent" in text


def test_what_is_no_message_is_a_loss():
    with run_of(2, raw=[1]) as (everyone, losses):
        everyone[1].links[0].send(b"GET / HTTP/1.1\r\n\r\n")
        assert "sent what is no message of pdjax" in losses[0].get(timeout=WAIT_S)


def test_an_error_in_the_watch_is_not_silent():
    with run_of(2, raw=[1]) as (everyone, losses):
        everyone[1].say(kind="lost")
        assert "the watch over the other processes failed" in losses[0].get(timeout=WAIT_S)


def test_a_loss_while_waiting_at_the_end():
    with run_of(2, raw=[1]) as (everyone, losses), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(everyone[0].close)
        everyone[1].crash()
        assert "was killed or crashed" in losses[0].get(timeout=WAIT_S)
        waiting.result(WAIT_S)


def test_one_that_reads_nothing_does_not_block_the_others():
    """A stopped process takes nothing in; the others still talk, and notice."""
    with run_of(3, raw=[2], lost_s=2.0) as (everyone, losses):
        everyone[0].describe("x" * 20_000_000)
        wait_until(lambda: everyone[1]._mesh.standings[0].stages)
        assert "process 2" in losses[0].get(timeout=WAIT_S)


# --- parts


@given(st.lists(st.dictionaries(st.text(), st.integers())), st.lists(st.integers(1, 50)))
def test_messages_arrive_whole_however_they_are_cut(messages, cuts):
    near, far = tcp_pair()
    link = Link(far)
    wire = b"".join(map(encode, messages))
    found = []
    while wire:
        size = cuts.pop() if cuts else len(wire)
        near.sendall(wire[:size])
        wire = wire[size:]
        found += link.read(1.0)
    near.close()
    found += link.read(1.0)
    assert found == messages
    assert link.ended == "closed"
    link.close()


@pytest.mark.parametrize(
    "words", [b"x", b"pdjy", b"pdjx\xff\xff\xff\xff", encode({})[:-2] + b"[]", b"pdjx\0\0\0\1x"]
)
def test_what_is_no_message(words):
    near, far = tcp_pair()
    link = Link(far)
    near.sendall(words)
    with near, pytest.raises(ForeignError):
        link.read(1.0)
    link.close()


def test_the_relay_stays_open_when_the_server_dies():
    port = free_port()
    relay = Relay("127.0.0.1", port, time.monotonic() + WAIT_S)
    near = connect(int(relay.address.rpartition(":")[2]))
    near.sendall(b"hello")
    with listen_at(Address("127.0.0.1", port)) as server:  # later than the client
        far = server.accept()[0]
    assert far.recv(5) == b"hello"
    far.sendall(b"answer")
    assert near.recv(6) == b"answer"
    far.close()
    near.settimeout(0.3)
    with pytest.raises(TimeoutError):
        near.recv(1)
    near.close()


def test_the_relay_ends_the_connection_when_the_client_does():
    with listen_at(Address("127.0.0.1", 0)) as server:
        relay = Relay("127.0.0.1", server.getsockname()[1], time.monotonic() + WAIT_S)
        near = connect(int(relay.address.rpartition(":")[2]))
        far = server.accept()[0]
        near.close()
        far.settimeout(WAIT_S)
        assert far.recv(1) == b""
        far.close()


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


def wait_until(condition) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
