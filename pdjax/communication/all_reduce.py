"""Sums over the replicas of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from pdjax.communication.ring import Replicas, RingReduce, ring_bytes
from pdjax.trace.jit import Values, jit_on, total

_AXIS = "replica"


def find_reduce(
    replicas: Replicas, shapes: Sequence[jax.ShapeDtypeStruct], *, mean: bool = False
) -> Reduce:
    """What sums arrays over the devices of a stage's replicas.

    Args:
        replicas: where they are.
        shapes: of the arrays.
        mean: whether to make their mean instead.
    """
    devices = [next(iter(placement.device_set)) for placement in replicas.placements]
    if any(device.platform != "cpu" for device in devices):
        return AllReduce(replicas.placements, shapes, mean=mean)
    if all(replicas.is_local):
        return SumOnEach(replicas.placements, shapes, mean=mean)
    return RingReduce(replicas, shapes, mean=mean)


class AllReduce:
    """Sums arrays over the devices of a stage's replicas; each of them gets all of the sum.

    It is a program of its own, so that a pass that waits for a cotangent does not wait for the
    network. For GPUs and TPUs, whose collectives keep no thread waiting.

    Args:
        placements: where the replicas are, one device each.
        shapes: of the arrays.
        mean: whether to make their mean instead.
    """

    def __init__(
        self,
        placements: Sequence[Sharding],
        shapes: Sequence[jax.ShapeDtypeStruct],
        *,
        mean: bool = False,
    ) -> None:
        self._devices = [next(iter(placement.device_set)) for placement in placements]
        self._is_local = [device.process_index == jax.process_index() for device in self._devices]
        self._shapes = tuple(shapes)
        mesh = Mesh(np.array(self._devices), (_AXIS,))
        self._sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
        combine = jax.lax.pmean if mean else jax.lax.psum
        self._run = jax.jit(
            jax.shard_map(
                lambda arrays: combine(arrays, _AXIS),
                mesh=mesh,
                in_specs=PartitionSpec(_AXIS),
                out_specs=PartitionSpec(_AXIS),
                check_vma=False,
            )
        )
        # An array is one shard of a longer one: what has no axis gets one for the way, and what has
        # no elements gets one, too, as some versions of XLA crash over it.
        self._odd = [at for at, s in enumerate(self._shapes) if not s.shape or not s.size]
        odd = [self._shapes[at] for at in self._odd]
        self._lengthen, self._shorten = (
            [jit_on(function, placement) for placement in placements]
            for function in (
                lambda arrays: tuple(jnp.resize(x, (1,)) for x in arrays),
                lambda arrays: tuple(
                    x[: s.size].reshape(s.shape) for x, s in zip(arrays, odd, strict=True)
                ),
            )
        )
        self._zeros = _zeros(self._shapes, placements)

    def lowerings(self) -> Iterator[Callable[[], Any]]:
        """Functions that lower all programs that calls run."""
        if not self._shapes:
            return
        count = len(self._devices)
        long = list(self._shapes)
        for at in self._odd:
            long[at] = jax.ShapeDtypeStruct((1,), long[at].dtype)
        whole = tuple(
            jax.ShapeDtypeStruct(
                (count * s.shape[0], *s.shape[1:]), s.dtype, sharding=self._sharding
            )
            for s in long
        )
        yield partial(self._run.lower, whole)
        before, after = (tuple(shapes[at] for at in self._odd) for shapes in (self._shapes, long))
        for at in (at for at, local in enumerate(self._is_local) if local):
            yield self._zeros[at].lower
            if self._odd:
                yield partial(self._lengthen[at].lower, before)
                yield partial(self._shorten[at].lower, after)

    @property
    def sent_bytes(self) -> int:
        """Bytes that each replica sends, around a ring."""
        return ring_bytes(self._shapes, len(self._devices))

    def __call__(self, parts: Sequence[Values | None]) -> list[Values | None]:
        """The sum on each replica.

        Where replicas are in other processes, these must call it, too, in the same order as what
        else replicas in both of them sum up.

        Args:
            parts: the arrays of each replica, where it is; None for one that has none, or is in
                another process.

        Returns:
            The sums; None for replicas in other processes.
        """
        if not self._shapes:
            return [() for _ in parts]
        given = [self._lengthened(at, part) for at, part in enumerate(parts) if self._is_local[at]]
        whole = tuple(self._joined(column) for column in zip(*given, strict=True))
        sums = self._run(whole)
        found: list[list[Any]] = [[] for _ in parts]
        for array in sums:
            by_device = {shard.device: shard.data for shard in array.addressable_shards}
            for at, device in enumerate(self._devices):
                if self._is_local[at]:
                    found[at].append(by_device[device])
        return [
            self._shortened(at, tuple(values)) if local else None
            for at, (values, local) in enumerate(zip(found, self._is_local, strict=True))
        ]

    def _lengthened(self, replica: int, part: Values | None) -> list[Any]:
        lengthened = list(self._zeros[replica]() if part is None else part)
        if self._odd:
            odd = tuple(lengthened[at] for at in self._odd)
            for at, value in zip(self._odd, self._lengthen[replica](odd), strict=True):
                lengthened[at] = value
        return lengthened

    def _shortened(self, replica: int, values: Values) -> Values:
        if not self._odd:
            return values
        shortened = list(values)
        long = tuple(values[at] for at in self._odd)
        for at, value in zip(self._odd, self._shorten[replica](long), strict=True):
            shortened[at] = value
        return tuple(shortened)

    def _joined(self, shards: Sequence[jax.Array]) -> jax.Array:
        shape = shards[0].shape
        length = shape[0] * len(self._devices)
        return jax.make_array_from_single_device_arrays(
            (length, *shape[1:]), self._sharding, list(shards)
        )


class SumOnEach:
    """The same for CPU devices of one process: every device fetches all parts, and sums them up.

    In a collective of XLA on a CPU threads wait for each other, and the process is ended if one of
    them is 40 seconds late, as the last one of a round of minibatches that take long may well be.

    Args:
        placements: where the replicas are, one device each.
        shapes: of the arrays.
        mean: whether to make their mean instead.
    """

    def __init__(
        self,
        placements: Sequence[Sharding],
        shapes: Sequence[jax.ShapeDtypeStruct],
        *,
        mean: bool = False,
    ) -> None:
        self._shapes = tuple(shapes)

        def combine(parts: Sequence[Values]) -> Values:
            sums = map(total, zip(*parts, strict=True))
            return tuple(x / len(parts) for x in sums) if mean else tuple(sums)

        self._runs = [jit_on(combine, placement) for placement in placements]
        self._zeros = _zeros(self._shapes, placements)

    def lowerings(self) -> Iterator[Callable[[], Any]]:
        """Functions that lower all programs that calls run."""
        if self._shapes:
            yield from (partial(run.lower, (self._shapes,) * len(self._runs)) for run in self._runs)
            yield from (zeros.lower for zeros in self._zeros)

    @property
    def sent_bytes(self) -> int:
        """Bytes that each replica would send around a ring: what is simulated."""
        return ring_bytes(self._shapes, len(self._runs))

    def __call__(self, parts: Sequence[Values | None]) -> list[Values | None]:
        """The sum on each replica; `parts` as for `AllReduce`."""
        if not self._shapes:
            return [() for _ in parts]
        given = tuple(
            zeros() if part is None else tuple(part)
            for part, zeros in zip(parts, self._zeros, strict=True)
        )
        return [run(given) for run in self._runs]


Reduce = AllReduce | RingReduce | SumOnEach


def _zeros(
    shapes: Sequence[jax.ShapeDtypeStruct], placements: Sequence[Sharding]
) -> list[Callable[[], Values]]:
    """For each replica a program that makes what one has that has no gradients."""
    return [
        jit_on(lambda: tuple(jnp.zeros(s.shape, s.dtype) for s in shapes), p) for p in placements
    ]


class MeanOfState:
    """Averages the mutable state of a stage's replicas, at every update.

    Real leaves are averaged; of others every replica keeps its own.

    Args:
        replicas: where they are.
        shapes: of the leaves that the stage updates, by index.
    """

    def __init__(self, replicas: Replicas, shapes: dict[int, jax.ShapeDtypeStruct]) -> None:
        self._indices = [i for i, s in shapes.items() if jnp.issubdtype(s.dtype, jnp.inexact)]
        self._mean = find_reduce(replicas, [shapes[i] for i in self._indices], mean=True)
        self.lowerings = self._mean.lowerings

    def __call__(self, states: Sequence[dict[int, Any]]) -> None:
        """Replaces the leaves of all replicas by their mean.

        Args:
            states: of each replica the leaves, by index; empty for one in another process.
        """
        parts = [tuple(state[i] for i in self._indices) if state else None for state in states]
        for state, means in zip(states, self._mean(parts), strict=True):
            if means is not None:
                state.update(zip(self._indices, means, strict=True))
