"""What processes talk over: messages of a connection, and the proxy of JAX's coordinator."""

from __future__ import annotations

import time

import pytest
from gatherings import WAIT_S, connect, tcp_pair
from hypothesis import given
from hypothesis import strategies as st

from pdjax.distributed.coordinator_proxy import CoordinatorProxy
from pdjax.distributed.frames import ForeignError, Link, encode
from pdjax.distributed.members import Address
from pdjax.distributed.rendezvous import listen_at
from pdjax.launch import free_port


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
    proxy = CoordinatorProxy("127.0.0.1", port, time.monotonic() + WAIT_S)
    near = connect(int(proxy.address.rpartition(":")[2]))
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
        proxy = CoordinatorProxy("127.0.0.1", server.getsockname()[1], time.monotonic() + WAIT_S)
        near = connect(int(proxy.address.rpartition(":")[2]))
        far = server.accept()[0]
        near.close()
        far.settimeout(WAIT_S)
        assert far.recv(1) == b""
        far.close()
