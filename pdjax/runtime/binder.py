"""A lowered schedule, bound to the programs, routes and placements of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdjax.communication.all_reduce import MeanOfState, Reduce
from pdjax.communication.ring import RingReduce
from pdjax.runtime.inputs import Reads
from pdjax.runtime.instructions import (
    Average,
    Block,
    Collect,
    Content,
    Free,
    Instruction,
    PrepareUpdate,
    ReduceGradients,
    RunPass,
    Send,
    Split,
    UpdateWeights,
    donated_by,
)
from pdjax.runtime.listing import Listing
from pdjax.runtime.replica_map import ReplicaMap
from pdjax.runtime.routing import Route, Routes, grouper, picker
from pdjax.runtime.update import UpdateRunner
from pdjax.schedules.lower import Destination, LoweredAction, Phases, ProgramKind
from pdjax.trace.jit import Values


@dataclass(frozen=True, eq=False)
class StageBinding:
    """What the instructions of one replica are bound to.

    Attributes:
        runner: has the programs of the passes, and what they read.
        routes: where values of the stage go.
        consts: the closed-over arrays that the stage reads.
        state: the leaves of the mutable state that it reads.
        updates: the leaves of the mutable state that it writes.
        averages: whether these are averaged over a minibatch.
        update: its part of the optimizer; None where nothing is trained.
        update_size: how many microbatches an update applies.
    """

    runner: Any
    routes: Routes
    consts: Values
    state: tuple[int, ...]
    updates: tuple[int, ...]
    averages: bool = False
    update: UpdateRunner | None = None
    update_size: int = 1


class Binder:
    """Binds a lowered schedule to programs.

    Args:
        rows: the schedule.
        cycle: microbatches in a cycle.
        bindings: of each replica.
        replicas: where the stages are.
        is_local: for each replica whether this process runs it.
        num_results: how many results the loss function has.
        weighted: whether an update needs the results of the minibatches that it applies.
        reduces: of each stage with replicas in this process the sum of their gradients, and the
            mean of their mutable state if it has one.
    """

    def __init__(
        self,
        rows: Phases,
        cycle: int,
        bindings: Sequence[StageBinding],
        replicas: ReplicaMap,
        is_local: Sequence[bool],
        num_results: int,
        *,
        weighted: bool = False,
        reduces: Mapping[int, tuple[Reduce, MeanOfState | None]] | None = None,
    ) -> None:
        self.rows, self.cycle, self.bindings, self.replicas = rows, cycle, bindings, replicas
        self.is_local, self.num_results = tuple(is_local), num_results
        self.weighted, self.reduces = weighted, reduces or {}
        updates = [row for rows_of_step in rows for row in rows_of_step if row.kind == "U"]
        phases = {each.update.num_phases for each in bindings if each.update}
        self.num_phases = max(phases, default=1)
        self.last_update = updates[-1] if self.num_phases > 1 else None

    def listing(self) -> Listing:
        """The instructions of this process."""
        phases = tuple(tuple(filter(None, self._blocks(rows))) for rows in self.rows)
        return Listing(phases, self.replicas, self.is_local)

    def _blocks(self, rows: Sequence[LoweredAction]) -> Iterator[Block | None]:
        """The blocks of a step, None where this process has nothing to do."""
        collected = False
        for row in rows:
            # An update that needs the weight of this minibatch: all processes collect it here.
            if row.kind == "U" and self.weighted and row.microbatch >= 0 and not collected:
                collected = True
                yield Block(0, 1, False, (Collect(),))
            yield self._update_block(row) if row.kind == "U" else self._pass_block(row)
        if not collected:
            yield Block(0, 1, False, (Collect(),))

    # -------- passes

    def _pass_block(self, row: LoweredAction) -> Block | None:
        replica = self.replicas.on_worker(row.worker, row.stage)
        found: list[Instruction] = []
        if self.is_local[replica]:
            found.append(self._run_pass(row, replica))
            found += self._after_pass(row, replica)
        found += filter(None, self._sends(row, replica))
        return Block(row.microbatch, 1, False, tuple(found)) if found else None

    def _run_pass(self, row: LoweredAction, replica: int) -> RunPass:
        bound = self.bindings[replica]
        runner, kind, routes = bound.runner, row.kind, bound.routes
        reads = runner.fused_reads if kind in ("FB", "FBU") else runner.forward_reads
        keeps = kind == "F" and bound.update is not None
        kept = runner.backward_reads if keeps else reads
        if kept == reads:
            kept = reads
        outputs = runner.fused_outputs if kind in ("FB", "FBU") else runner.forward_outputs
        forward = kind[0] == "F"
        return RunPass(
            kind=kind,
            replica=replica,
            microbatch=row.microbatch,
            program=_program(runner, kind),
            reads=_if_any(reads),
            kept_reads=_if_any(kept),
            keeps=keeps,
            consts=bound.consts,
            state=bound.state,
            updates=bound.updates,
            num_activations=routes.num_activations if forward else 0,
            group=grouper(routes.cotangents),
            pick_saved=picker(outputs.saved),
            pick_state=picker(outputs.state) if forward and outputs.state else None,
            averages=bound.averages,
            update=row.update,
            updates_per_cycle=self.cycle // bound.update_size,
            begins=row.begins,
            stash_bytes=row.stash_bytes,
            frees=row.frees,
            delay=row.delay,
            pins=row.pins,
            donates=donated_by(row, bound.update),
        )

    def _after_pass(self, row: LoweredAction, replica: int) -> Iterator[Instruction]:
        if row.frees:
            yield Free(replica, row.microbatch)
        ring = self._ring_of(row.stage)
        if ring is not None and row.completes:
            size = self.bindings[replica].update_size
            number = replica - self.replicas.of_stage(row.stage)[0]
            yield Split(replica, row.microbatch, number, ring, row.update, self.cycle // size)

    def _sends(self, row: LoweredAction, replica: int) -> Iterator[Send | None]:
        """What goes out of a pass, in the order in which all processes send and receive it."""
        runner, routes = self.bindings[replica].runner, self.bindings[replica].routes
        if row.kind[0] == "F":
            outputs = runner.forward_outputs if row.kind == "F" else runner.fused_outputs
            for to in row.sends:
                route = routes.forward[to.stage]
                picked = [outputs.sends[position] for position in route.sources]
                slots = self._routes_of(to).num_activations
                yield self._send("activations", row, replica, self._at(to), route, picked, slots)
            if routes.results.slots:
                collector = len(self.replicas) - 1
                picked = [outputs.results[position] for position in routes.results.sources]
                yield self._send(
                    "results", row, replica, collector, routes.results, picked, self.num_results
                )
        for to in row.returns:
            route = routes.backward[to.stage]
            slots = sum(self._routes_of(to).cotangents)
            yield self._send("cotangents", row, replica, self._at(to), route, route.sources, slots)

    def _send(
        self,
        content: Content,
        row: LoweredAction,
        source: int,
        target: int,
        route: Route,
        picked: Sequence[int],
        num_slots: int,
    ) -> Send | None:
        sends, receives = self.is_local[source], self.is_local[target]
        if not sends and not receives:
            return None
        slots = None if route.slots == tuple(range(num_slots)) else route.slots
        return Send(
            content,
            source,
            target,
            row.microbatch,
            picker(picked),
            route.shapes,
            route.num_bytes,
            slots,
            num_slots,
            sends,
            receives,
        )

    def _at(self, to: Destination) -> int:
        return self.replicas.on_worker(to.worker, to.stage)

    def _routes_of(self, to: Destination) -> Routes:
        return self.bindings[self._at(to)].routes

    # -------- updates

    def _update_block(self, row: LoweredAction) -> Block | None:
        replica = self.replicas.on_worker(row.worker, row.stage)
        found: list[Instruction] = []
        if row.reduces and row.stage in self.reduces:
            for other in self.replicas.of_stage(row.stage):
                found += self._averages(row, other)
            found.append(self._reduce(row))
        elif len(self.replicas.of_stage(row.stage)) == 1:
            found += self._averages(row, replica)
        if self.last_update is None:
            found += self._update_weights(row, replica)
        elif row is self.last_update:
            found += self._updates_together(row)
        if not found:
            return None
        size, waits = self.bindings[replica].update_size, self._ring_of(row.stage) is not None
        return Block(row.microbatch, size, waits, tuple(found))

    def _averages(self, row: LoweredAction, replica: int) -> Iterator[Average]:
        bound = self.bindings[replica]
        if bound.averages and bound.updates and self.is_local[replica]:
            yield Average(replica, row.microbatch, bound.updates)

    def _reduce(self, row: LoweredAction) -> ReduceGradients:
        replicas = self.replicas.of_stage(row.stage)
        local = tuple(self.is_local[at] for at in replicas)
        per_cycle = self.cycle // self.bindings[replicas[0]].update_size
        gradients, model = self.reduces[row.stage]
        return ReduceGradients(
            replicas, local, row.microbatch, gradients, model, row.update, per_cycle
        )

    def _update_weights(self, row: LoweredAction, replica: int) -> Iterator[Instruction]:
        if not self.is_local[replica]:
            return
        bound = self.bindings[replica]
        assert bound.update is not None, "there is an update"
        size = bound.update_size
        per_cycle = self.cycle // size
        yield UpdateWeights(
            replica,
            row.microbatch,
            bound.update,
            row.update,
            per_cycle,
            size,
            row.frees,
            row.delay is not None,
        )
        if row.frees:
            yield Free(replica, row.microbatch)

    def _updates_together(self, row: LoweredAction) -> Iterator[Instruction]:
        """The updates of all stages, where these exchange values between the phases."""
        for phase in range(self.num_phases - 1):
            for stage in range(len(self.replicas.num_replicas)):
                yield from self._prepare(row, phase, stage)
        for replica in range(len(self.replicas)):
            yield from self._update_weights(row, replica)

    def _prepare(self, row: LoweredAction, phase: int, stage: int) -> Iterator[PrepareUpdate]:
        replica = self.replicas.of_stage(stage)[0]
        bound, local = self.bindings[replica], self.is_local[replica]
        assert bound.update is not None, "there is an update"
        if not bound.update.sends(phase):
            return
        targets = tuple(
            target
            for target, other in enumerate(self.bindings)
            if other.update is not None and stage in other.update.sources[phase + 1]
            if local or self.is_local[target]
        )
        size = bound.update_size
        per_cycle = self.cycle // size
        if local or targets:
            yield PrepareUpdate(
                replica,
                stage,
                row.microbatch,
                phase,
                bound.update,
                targets,
                local,
                row.update,
                per_cycle,
                size,
            )

    def _ring_of(self, stage: int) -> RingReduce | None:
        """What sums the gradients of a stage's replicas, if it is made of transfers."""
        reduce = self.reduces[stage][0] if stage in self.reduces else None
        return reduce if isinstance(reduce, RingReduce) else None


def _program(runner: Any, kind: ProgramKind) -> Callable[..., Any]:
    """The program of a stage that does `kind`."""
    if kind in ("I", "W"):
        return runner.divided.input_part if kind == "I" else runner.divided.weight_part
    return getattr(runner, {"F": "forward", "B": "backward", "FB": "fused", "FBU": "whole"}[kind])


def _if_any(reads: Reads) -> Reads | None:
    return reads if any(reads) else None
