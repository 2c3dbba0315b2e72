"""Sums arrays over devices of several processes, piece by piece around a ring.

Every device sends to the next one only. In r - 1 rounds each of r pieces goes around and is added
up, in r - 1 more each sum goes around, so that a device sends 2 (r - 1) / r of the bytes of the
arrays, which is the least that there can be (Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", 2009, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from pdjax.communication.transport import Transport
from pdjax.trace.jit import Values, jit_on

_SMALL_BYTES = 2**18
"""Up to which parts of arrays travel together: 61 small ones take a third of the time so."""


class Replicas(NamedTuple):
    """The replicas of a stage.

    Attributes:
        replicas: their numbers among the replicas of all stages.
        placements: where each of them is, one device each.
        transport: how values travel between replicas.
    """

    replicas: Sequence[int]
    placements: Sequence[Sharding]
    transport: Transport

    @property
    def is_local(self) -> list[bool]:
        """For each replica whether this process runs it."""
        return [self.transport.is_local[replica] for replica in self.replicas]


class Pieces(NamedTuple):
    """The arrays of a replica, cut.

    Attributes:
        pieces: of each piece the parts of arrays that are in it.
    """

    pieces: Sequence[Values]


class RingReduce:
    """An all-reduce out of transfers and programs of one device each.

    In a collective of XLA on a CPU a thread of each process waits for the other processes. There
    are as many threads as cores, so that it keeps one from computing: with one core, everything.
    Here no thread waits, and passes are computed while a sum is on its way.

    Args:
        replicas: where they are; all processes that have one must make the same calls.
        shapes: of the arrays.
        mean: whether to make their mean instead.
    """

    def __init__(
        self, replicas: Replicas, shapes: Sequence[jax.ShapeDtypeStruct], *, mean: bool = False
    ) -> None:
        self._replicas = replicas
        self._is_local = replicas.is_local
        self._shapes = tuple(shapes)
        layout = _Layout(shapes, len(replicas.replicas))
        self._piece_shapes = layout.piece_shapes
        self._split, self._add, self._join, self._zeros = (
            [jit_on(function, placement) for placement in replicas.placements]
            for function in (
                layout.split,
                lambda one, other: tuple(map(jnp.add, one, other)),
                partial(layout.join, mean=mean),
                lambda: tuple(jnp.zeros(s.shape, s.dtype) for s in shapes),
            )
        )

    def lowerings(self) -> Iterator[Callable[[], Any]]:
        """Functions that lower all programs that calls run."""
        for at in (at for at, local in enumerate(self._is_local) if local):
            yield self._zeros[at].lower
            yield partial(self._split[at].lower, self._shapes)
            yield from (partial(self._add[at].lower, piece, piece) for piece in self._piece_shapes)
            yield partial(self._join[at].lower, self._piece_shapes)

    @property
    def sent_bytes(self) -> int:
        """Bytes that each replica sends."""
        return ring_bytes(self._shapes, len(self._is_local))

    def begin(self, at: int, part: Values) -> Pieces:
        """Cuts the arrays of a replica of this process.

        It may be called as soon as they are complete, in the thread that dispatches passes: cut
        behind passes that follow, they would be sent too late to be on their way meanwhile.

        Args:
            at: which replica.
            part: its arrays.
        """
        return Pieces(self._split[at](tuple(part)))

    def __call__(self, parts: Sequence[Values | Pieces | None]) -> list[Values | None]:
        """The sum on each replica.

        Args:
            parts: the arrays of each replica, where it is, or what `begin` has made of them; None
                for one that has none, or is in another process.

        Returns:
            The sums; None for replicas in other processes.
        """
        count = len(parts)
        pieces: list[list[Values] | None] = [
            self._pieces(at, part) if local else None
            for at, (part, local) in enumerate(zip(parts, self._is_local, strict=True))
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
        replicas, count = self._replicas.replicas, len(pieces)
        found = []
        for source, own in enumerate(pieces):
            target, number = (source + 1) % count, (source + offset) % count
            came = self._replicas.transport.send_recv(
                None if own is None else own[number],
                self._piece_shapes[number],
                replicas[source],
                replicas[target],
            )
            if self._is_local[target]:
                found.append((target, tuple(came or ())))
        return found


class _Part(NamedTuple):
    """Elements `start` to `end` of array number `at`."""

    at: int
    start: int
    end: int


class _Layout:
    """How arrays, one behind the other, are cut into `count` pieces of as many bytes.

    A piece is a tuple of parts of arrays, which need not be laid side by side: in one long array
    of all of them XLA would look for the source of every single element. Only small parts of one
    type travel in one array, since each array that travels has a price of its own.
    """

    def __init__(self, shapes: Sequence[jax.ShapeDtypeStruct], count: int) -> None:
        self._shapes, self._count = shapes, count
        starts = list(accumulate((_num_bytes(s) for s in shapes), initial=0))
        cuts = [starts[-1] * n // count for n in range(count + 1)]

        def element(at: int, cut: int) -> int:
            """How many elements of array number `at` come before a cut."""
            before = min(max(cut - starts[at], 0), _num_bytes(shapes[at]))
            return before // shapes[at].dtype.itemsize

        self._pieces = [
            self._grouped(
                _Part(at, element(at, first), element(at, last))
                for at in range(len(shapes))
                if element(at, first) < element(at, last)
            )
            for first, last in pairwise(cuts)
        ]
        self.piece_shapes = tuple(
            tuple(
                jax.ShapeDtypeStruct((sum(map(_num_elements, group)),), shapes[group[0].at].dtype)
                for group in groups
            )
            for groups in self._pieces
        )

    def split(self, arrays: Values) -> tuple[Values, ...]:
        def flat(part: _Part) -> Any:
            return arrays[part.at].ravel()[part.start : part.end]

        return tuple(
            tuple(jnp.concatenate([flat(part) for part in group]) for group in groups)
            for groups in self._pieces
        )

    def join(self, pieces: Sequence[Values], *, mean: bool) -> Values:
        found: list[list[Any]] = [[] for _ in self._shapes]
        for groups, values in zip(self._pieces, pieces, strict=True):
            for group, value in zip(groups, values, strict=True):
                ends = list(accumulate(map(_num_elements, group)))
                for part, own in zip(group, jnp.split(value, ends[:-1]), strict=True):
                    found[part.at].append(own / self._count if mean else own)
        return tuple(
            jnp.concatenate(values).reshape(s.shape) if values else jnp.zeros(s.shape, s.dtype)
            for values, s in zip(found, self._shapes, strict=True)
        )

    def _grouped(self, parts: Iterable[_Part]) -> list[list[_Part]]:
        """The parts that travel in one array each."""
        large: list[list[_Part]] = []
        small: dict[Any, list[_Part]] = {}
        for part in parts:
            dtype = self._shapes[part.at].dtype
            if _num_elements(part) * dtype.itemsize > _SMALL_BYTES:
                large.append([part])
            else:
                small.setdefault(dtype, []).append(part)
        return [*large, *small.values()]


def _num_elements(part: _Part) -> int:
    return part.end - part.start


def ring_bytes(shapes: Sequence[jax.ShapeDtypeStruct], count: int) -> int:
    """What each of `count` replicas sends: 2 (r - 1) / r of the bytes of the arrays."""
    size = sum(map(_num_bytes, shapes))
    return round(2 * (count - 1) / count * size)


def _num_bytes(shape: jax.ShapeDtypeStruct) -> int:
    return shape.size * shape.dtype.itemsize
