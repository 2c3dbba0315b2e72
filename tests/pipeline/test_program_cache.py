"""Programs of batch shapes: how many are kept, and which."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pdjax
from pdjax.pipeline.program_cache import ProgramCache


def test_the_least_recently_used_one_is_dropped():
    cache = ProgramCache[str](bound=3)
    made = []

    def get(key):
        return cache.get(key, lambda: made.append(key) or key.upper())

    for key in "abcbd":
        assert get(key) == key.upper()
    assert list(cache) == ["a", "b", "d"]  # c was used before b
    assert cache.num_recompilations == 0
    get("c")
    assert list(cache) == ["a", "d", "c"]
    assert made == ["a", "b", "c", "d", "c"]
    assert cache.num_recompilations == 1


def test_the_first_one_stays():
    cache = ProgramCache[int](bound=2)
    for key in (1, 2, 3, 4):
        cache.get(key, lambda key=key: key)
    assert list(cache) == [1, 4]
    with pytest.raises(ValueError, match="expected at least 1"):
        ProgramCache(0)


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["a"]) @ params["b"]) ** 2)


def test_recompilations_of_batch_shapes_are_counted():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 1))}
    pipe = pdjax.Pipeline(
        loss_fn, optax.sgd(0.1), num_stages=2, num_microbatches=2, max_batch_shapes=2
    )
    batches = {size: np.ones((size, 3), np.float32) for size in (4, 6, 8)}
    state = pipe.init(params, batches[4])

    def recompilations(*sizes):
        nonlocal state
        for size in sizes:
            state, _ = pipe.step(state, batches[size])
        return pipe.counts(state).num_recompilations

    assert recompilations(4, 6, 4, 6) == 0
    assert recompilations(8, 4, 6) == 1  # the first one stays, 6 was dropped for 8
