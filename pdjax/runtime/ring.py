"""Sums arrays over devices of several processes, piece by piece around a ring.

Every device sends to the next one only. In r - 1 rounds each of r pieces goes around and is added
up, in r - 1 more each sum goes around, so that a device sends 2 (r - 1) / r of the bytes of the
arrays, which is the least that there can be (Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", 2009, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from math import ceil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from pdjax.runtime.placed import Values, placed
from pdjax.runtime.transport import Transport


class Replicas(NamedTuple):
    """The replicas of a stage.

    Attributes:
        places: their places.
        placements: where each of them is, one device each.
        transport: how values travel between places.
    """

    places: Sequence[int]
    placements: Sequence[Sharding]
    transport: Transport

    @property
    def here(self) -> list[bool]:
        """For each replica whether this process runs it."""
        return [self.transport.here[place] for place in self.places]


class Pieces(NamedTuple):
    """The arrays of a replica, cut.

    Attributes:
        pieces: each of them has a part of the arrays of every type.
    """

    pieces: Sequence[Values]


class RingReduce:
    """An all-reduce out of transfers and programs of one device each.

    In a collective of XLA on a CPU a thread of each process waits for the other processes. There
    are as many threads as cores, so that it keeps one from computing: with one core, everything.
    Here nobody waits, and passes are computed while a sum is on its way.

    Args:
        replicas: where they are; all processes that have one must make the same calls.
        shapes: of the arrays.
        mean: whether to make their mean instead.
    """

    def __init__(
        self, replicas: Replicas, shapes: Sequence[jax.ShapeDtypeStruct], *, mean: bool = False
    ) -> None:
        self._replicas = replicas
        self._here = replicas.here
        self._shapes = tuple(shapes)
        layout = _Layout(shapes, len(replicas.places))
        self._piece = layout.piece
        self._split, self._add, self._join, self._zeros = (
            [placed(function, placement) for placement in replicas.placements]
            for function in (
                layout.split,
                lambda one, other: tuple(map(jnp.add, one, other)),
                partial(layout.join, mean=mean),
                lambda: tuple(jnp.zeros(s.shape, s.dtype) for s in shapes),
            )
        )

    def lowerings(self) -> Iterator[Callable[[], Any]]:
        """Functions that lower all programs that calls run."""
        if not self._piece:
            return
        count = len(self._here)
        for at in (at for at, here in enumerate(self._here) if here):
            yield self._zeros[at].lower
            yield partial(self._split[at].lower, self._shapes)
            yield partial(self._add[at].lower, self._piece, self._piece)
            yield partial(self._join[at].lower, (self._piece,) * count)

    @property
    def sent_bytes(self) -> int:
        """Bytes that each replica sends."""
        return ring_bytes(self._shapes, len(self._here))

    def begin(self, at: int, part: Values) -> Pieces:
        """Cuts the arrays of a replica of this process.

        It may be called as soon as they are complete, in the thread that dispatches passes: cut
        behind passes that follow, they would be sent too late to be on their way meanwhile.

        Args:
            at: which replica.
            part: its arrays.
        """
        return Pieces(self._split[at](tuple(part)) if self._piece else ())

    def __call__(self, parts: Sequence[Values | Pieces | None]) -> list[Values | None]:
        """The sum on each replica.

        Args:
            parts: the arrays of each replica, where it is, or what `begin` has made of them; None
                for one that has none, or is in another process.

        Returns:
            The sums; None for replicas in other processes.
        """
        count = len(parts)
        if not self._piece:  # nothing to add up
            return [self._zeros[at]() if here else None for at, here in enumerate(self._here)]
        pieces: list[list[Values] | None] = [
            self._pieces(at, part) if here else None
            for at, (part, here) in enumerate(zip(parts, self._here, strict=True))
        ]
        for turn in range(count - 1):
            for at, came in self._pass_on(pieces, -turn):
                number, own = (at - 1 - turn) % count, pieces[at]
                assert own is not None
                own[number] = self._add[at](came, own[number])
        for turn in range(count - 1):
            for at, came in self._pass_on(pieces, 1 - turn):
                own = pieces[at]
                assert own is not None
                own[(at - turn) % count] = came
        return [
            None if own is None else self._join[at](tuple(own)) for at, own in enumerate(pieces)
        ]

    def _pieces(self, at: int, part: Values | Pieces | None) -> list[Values]:
        if isinstance(part, Pieces):
            return list(part.pieces)
        return list(self._split[at](self._zeros[at]() if part is None else tuple(part)))

    def _pass_on(self, pieces: Sequence[list[Values] | None], offset: int) -> list[Any]:
        """Each replica sends the piece of its own number plus `offset` to the next one.

        Returns:
            What came to which replica of this process.
        """
        places, count = self._replicas.places, len(pieces)
        found = []
        for source, own in enumerate(pieces):
            target = (source + 1) % count
            values = None if own is None else own[(source + offset) % count]
            came = self._replicas.transport.move(
                values, self._piece, places[source], places[target]
            )
            if self._here[target]:
                found.append((target, tuple(came or ())))
        return found


class _Layout:
    """How arrays are cut into equal pieces: those of a type one behind the other, in `count`."""

    def __init__(self, shapes: Sequence[jax.ShapeDtypeStruct], count: int) -> None:
        self._shapes, self._count = shapes, count
        by_type = sorted(
            (at for at, s in enumerate(shapes) if s.size), key=lambda at: str(shapes[at].dtype)
        )
        self._groups = [
            list(group) for _, group in groupby(by_type, key=lambda at: str(shapes[at].dtype))
        ]
        self._lengths = [
            ceil(sum(shapes[at].size for at in group) / count) for group in self._groups
        ]
        self.piece = tuple(
            jax.ShapeDtypeStruct((length,), shapes[group[0]].dtype)
            for group, length in zip(self._groups, self._lengths, strict=True)
        )

    def split(self, arrays: Values) -> tuple[Values, ...]:
        flat = []
        for group, length in zip(self._groups, self._lengths, strict=True):
            whole = jnp.concatenate([arrays[at].ravel() for at in group])
            padded = jnp.pad(whole, (0, length * self._count - whole.size))
            flat.append(jnp.split(padded, self._count))
        return tuple(zip(*flat, strict=True))

    def join(self, pieces: Sequence[Values], *, mean: bool) -> Values:
        found = [jnp.zeros(s.shape, s.dtype) for s in self._shapes]
        for number, group in enumerate(self._groups):
            whole = jnp.concatenate([piece[number] for piece in pieces])
            ends = np.cumsum([0, *(self._shapes[at].size for at in group)]).tolist()
            for at, (start, end) in zip(group, pairwise(ends), strict=True):
                found[at] = whole[start:end].reshape(self._shapes[at].shape)
        return tuple(x / self._count for x in found) if mean else tuple(found)


def ring_bytes(shapes: Sequence[jax.ShapeDtypeStruct], count: int) -> int:
    """What each of `count` replicas sends: 2 (r - 1) / r of the bytes of the arrays."""
    size = sum(s.size * s.dtype.itemsize for s in shapes)
    return round(2 * (count - 1) / count * size)
