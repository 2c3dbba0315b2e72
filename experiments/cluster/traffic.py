"""What one host measures of its links; `measure.py` runs it on all of them.

    traffic.py FILE NUM_BYTES SECONDS

Host 0 writes to FILE, as JSON: the payload of one TCP connection from host 0 to host 1 and of two
in both directions at once (bits per second), the round trip of 64 bytes, the seconds of an
all-reduce of NUM_BYTES among all hosts with the bytes that it sent, and the payload of arrays that
host 0 pulls from host 1.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from counters import own_counters
from jax.experimental import transfer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

NUM_HOSTS = int(os.environ["PDJAX_NUM_PROCESSES"])
HOST = int(os.environ["PDJAX_PROCESS_ID"])
COORDINATOR = os.environ["PDJAX_COORDINATOR"]
_PORT = 5000
_PULLED_BYTES = 8 << 20
_NUM_REPEATS = 5
_NUM_TRIPS = 500


def connected() -> socket.socket:
    """A connection between host 0 and host 1."""
    if HOST == 0:
        with socket.create_server((socket.gethostname(), _PORT)) as server:
            sock = server.accept()[0]
    else:
        while True:
            try:
                sock = socket.create_connection(("host0", _PORT))
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def send(sock: socket.socket, seconds: float) -> None:
    """Sends for a while, then says that this was all."""
    piece, end = bytes(1 << 16), time.perf_counter() + seconds
    while time.perf_counter() < end:
        sock.sendall(piece)
    sock.shutdown(socket.SHUT_WR)


def receive(sock: socket.socket) -> float:
    """Bits per second received until the other has sent all, from the first byte on."""
    buffer, start, num_bytes = bytearray(1 << 20), 0.0, 0
    while received := sock.recv_into(buffer):
        start = start or time.perf_counter()
        num_bytes += received
    return num_bytes * 8 / (time.perf_counter() - start)


def one_way(seconds: float) -> float:
    """Bits per second that host 1 receives from host 0; 0 on host 0."""
    with connected() as sock:
        if HOST == 0:
            send(sock, seconds)
            return float(sock.recv(100))
        rate = receive(sock)
        sock.sendall(str(rate).encode())
        return rate


def both_ways(seconds: float) -> float:
    """Bits per second that this host receives while it sends."""
    with connected() as sock:
        sender = threading.Thread(target=send, args=(sock, seconds))
        sender.start()
        rate = receive(sock)
        sender.join()
        return rate


def round_trip_s() -> float:
    """Seconds from host 0 to host 1 and back, the median."""
    times = []
    with connected() as sock:
        for _ in range(_NUM_TRIPS):
            start = time.perf_counter()
            if HOST == 0:
                sock.sendall(bytes(64))
            sock.recv(64)
            if HOST == 1:
                sock.sendall(bytes(64))
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def all_reduce(num_bytes: int) -> tuple[float, int]:
    """Seconds of an all-reduce among all hosts, the median, and the bytes that this host sent."""
    mesh = Mesh(np.array(jax.devices()), ("replica",))
    spec = PartitionSpec("replica")
    own = jax.device_put(jnp.ones(num_bytes // 4), jax.local_devices()[0])
    given = jax.make_array_from_single_device_arrays(
        (NUM_HOSTS * len(own),), NamedSharding(mesh, spec), [own]
    )
    sum_of = jax.jit(
        jax.shard_map(
            lambda a: jax.lax.psum(a, "replica"), mesh=mesh, in_specs=spec, out_specs=spec
        )
    )
    measured = [seconds_and_bytes(lambda: sum_of(given)) for _ in range(_NUM_REPEATS + 1)][1:]
    return (
        statistics.median(seconds for seconds, _ in measured),
        round(statistics.median(sent for _, sent in measured)),
    )


def seconds_and_bytes(function: Callable[[], jax.Array]) -> tuple[float, int]:
    """Of a call that ends on all hosts at about the same time."""
    before, start = own_counters(), time.perf_counter()
    function().block_until_ready()
    seconds = time.perf_counter() - start
    time.sleep(0.05)  # late packets of this test do not meet the next
    return seconds, (own_counters() - before).sent_bytes


def pulls() -> float:
    """Bits per second of arrays that host 0 pulls from host 1, one after another."""
    device = jax.local_devices()[0]
    address = f"{socket.gethostbyname(socket.gethostname())}:0"
    server = transfer.start_transfer_server(device.client, address, [address])
    array = jax.device_put(jnp.ones(_PULLED_BYTES // 4), device)
    shape = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=SingleDeviceSharding(device))
    with connected() as sock:
        if HOST == 1:
            sock.sendall(server.address().encode())
            for number in range(_NUM_REPEATS + 1):
                server.await_pull(number, [array])
            sock.recv(1)
            return 0.0
        connection = server.connect(sock.recv(100).decode())
        times = []
        for number in range(_NUM_REPEATS + 1):
            start = time.perf_counter()
            jax.block_until_ready(connection.pull(number, [shape]))
            times.append(time.perf_counter() - start)
        return _PULLED_BYTES * 8 / statistics.median(times[1:])


def main(path: str, num_bytes: int, seconds: float) -> None:
    """Measures everything; the hosts meet before each part in its first exchange."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(COORDINATOR, NUM_HOSTS, HOST)
    reduce_s, reduce_sent_bytes = all_reduce(num_bytes)
    found = {"reduce_s": reduce_s, "reduce_sent_bytes": reduce_sent_bytes}
    if HOST < 2:
        found["one_way_bits_per_s"] = one_way(seconds)
        found["both_ways_bits_per_s"] = both_ways(seconds)
        found["round_trip_s"] = round_trip_s()
        found["pull_bits_per_s"] = pulls()
    if HOST == 0:
        with open(path, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
