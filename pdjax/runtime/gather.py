"""Gathers leaves of parameters or mutable state from the replicas that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from pdjax.communication.transport import Transport
from pdjax.runtime.replica_map import ReplicaMap
from pdjax.runtime.state import LastingState, Run
from pdjax.trees import is_key, place


class Gather:
    """The leaves of the parameters, or of the mutable state.

    Args:
        replicas: where the stages are.
        homes: for each leaf the stages that hold it.
        shapes: for each leaf its shape.
        read: ``read(state, stage, index)``: a leaf out of what a replica of a stage holds.
        transport: how values travel.
    """

    def __init__(
        self,
        replicas: ReplicaMap,
        homes: Sequence[Sequence[int]],
        shapes: Sequence[Any],
        read: Callable[[LastingState, int, int], Any],
        transport: Transport,
    ) -> None:
        self._replicas = replicas
        self._homes = homes
        self._shapes = shapes
        self._read = read
        self._transport = transport

    def at(self, run: Run, index: int, stage: int) -> Any:
        """A leaf at the first replica of a stage; None if that is in another process."""
        homes = self._homes[index]
        home = stage if stage in homes else homes[0]
        source, value = self._find(run, index, home)
        target = self._replicas.of_stage(stage)[0]
        if value is not None and not self._transport.is_local[target]:
            value = [place(leaf, leaf.sharding) for leaf in value]  # steps donate what is held
        moved = self._transport.send_recv(value, [self._shapes[index]], source, target)
        return None if moved is None else moved[0]

    def everywhere(self, run: Run) -> Iterator[jax.Array]:
        """Every leaf, one by one, on some device of each process.

        Ends when all processes have all of them: what is held may be donated from then on.
        """
        found = [self._find(run, index, homes[0]) for index, homes in enumerate(self._homes)]
        for _, value in found:
            if value is not None and not is_key(value[0]):
                value[0].copy_to_host_async()
        for (source, value), shape in zip(found, self._shapes, strict=True):
            yield jax.block_until_ready(self._transport.broadcast(value, [shape], source)[0])
        self._transport.barrier()

    def _find(self, run: Run, index: int, home: int) -> tuple[int, list[Any] | None]:
        source = self._replicas.of_stage(home)[0]
        if not self._transport.is_local[source]:
            return source, None
        return source, [self._read(run.stages[source].lasting, home, index)]
