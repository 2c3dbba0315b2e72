"""Sends arrays while the only thread that computes has seconds of work before it."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from pdjax import distributed
from pdjax.communication.remote import RemoteTransport

NUM_PRODUCTS = 300  # of matrices: seconds, where what is sent takes milliseconds

peers = distributed.initialize()
first = {device.process_index: device for device in reversed(jax.devices())}
places = [SingleDeviceSharding(first[process]) for process in (0, 1)]
transport = RemoteTransport(places, peers)
shapes = [jax.ShapeDtypeStruct((1000,), np.float32)] * 20
values = [np.full(1000, n, np.float32) for n in range(20)]


@jax.jit
def work(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, NUM_PRODUCTS, lambda _, y: x @ y, x)


if peers.process_id == 0:
    own = [jax.device_put(value, places[0]) for value in values]
    large = jax.device_put(np.zeros((800, 800), np.float32), places[0])
    run = work.lower(large).compile()
    jax.block_until_ready((own, large))
    worked = run(large)
    transport.send_recv(own, shapes, 0, 1)
    transport.barrier()  # it is asked for from here on
    peers.exchange("has arrived", None)
    assert not worked.is_ready(), "the arrays waited for the computation"
else:
    transport.barrier()
    came = transport.send_recv(None, shapes, 0, 1)
    assert came is not None
    for found, expected in zip(came, values, strict=True):
        np.testing.assert_array_equal(found, expected)
    peers.exchange("has arrived", None)
