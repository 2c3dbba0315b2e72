"""What each replica holds before the first step: weights, optimizer state, mutable state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Sharding

from pdjax.runtime.replica_map import ReplicaMap
from pdjax.runtime.state import LastingState, Run, StageState, WorkerTally
from pdjax.split.optimizer import StageUpdate, UpdateSplit
from pdjax.split.traced_update import init_program
from pdjax.trace import inline
from pdjax.trace.inline import InlinedProgram
from pdjax.trace.jit import Values, jit_on
from pdjax.trace.program import Program, sliced
from pdjax.trees import is_function, place


class Starter:
    """Makes what replicas hold, each leaf where it lives and nowhere else.

    Args:
        optimizer: the optimizer.
        shapes: the shapes of the parameters.
        params: the parameters, or a function that makes them.
        model_state: the mutable state, or a function that makes it.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        shapes: Any,
        params: Any,
        model_state: Any,
    ) -> None:
        self._params, self._state = _source(params), _source(model_state)
        self._init, _ = init_program(optimizer, shapes)

    def start(self, mine: StageUpdate, state: Sequence[int], placement: Sharding) -> LastingState:
        """What one replica holds.

        Args:
            mine: the update of its stage.
            state: which leaves of the mutable state it holds.
            placement: where it is.
        """
        weights = self._params.take(mine.params, placement)
        model = dict(zip(state, self._state.take(state, placement), strict=True))
        return LastingState(weights, self._optimizer_state(mine, weights, placement), model)

    def _optimizer_state(self, mine: StageUpdate, weights: Values, placement: Sharding) -> Values:
        init = self._init
        program = _slice(init, mine.state)
        values = dict(zip((init.invars[i] for i in mine.params), weights, strict=True))
        values |= zip(init.constvars, init.consts, strict=True)
        others = [i for i, var in enumerate(init.invars) if var in set(program.reads) - set(values)]
        read = zip(others, self._params.take(others, placement), strict=True)
        values |= {init.invars[i]: leaf for i, leaf in read}
        return _run(program, values, placement)


def start_run(
    starter: Starter,
    update: UpdateSplit,
    state_homes: Sequence[Sequence[int]],
    replicas: ReplicaMap,
    placements: Sequence[Sharding | None],
    num_workers: int,
) -> Run:
    """What all replicas hold before the first step.

    Args:
        starter: makes what one replica holds.
        update: the optimizer, cut into stages.
        state_homes: for each leaf of the mutable state the stages that hold it.
        replicas: where the stages are.
        placements: for each replica its devices; None for one in another process.
        num_workers: number of workers.
    """
    stages = []
    for stage, placement in zip(replicas.stage_of, placements, strict=True):
        state = [i for i, homes in enumerate(state_homes) if stage in homes]
        made = LastingState((), (), {})
        if placement is not None:
            made = starter.start(update.stages[stage], state, placement)
        stages.append(StageState(made))
    workers = [0] * num_workers
    for held, worker in zip(stages, replicas.worker_of, strict=True):
        workers[worker] += held.lasting.weight_bytes
    return Run(stages, list(map(WorkerTally, workers)), replicas.worker_of)


class _Source(Protocol):
    def take(self, indices: Sequence[int], placement: Sharding) -> Values:
        """Some of the leaves, on the devices of a replica."""
        ...


class _Given:
    def __init__(self, tree: Any) -> None:
        self._leaves = jax.tree.leaves(tree)

    def take(self, indices: Sequence[int], placement: Sharding) -> Values:
        return tuple(place(self._leaves[i], placement) for i in indices)


class _Made:
    """Leaves that a function makes: what makes the others is not run."""

    def __init__(self, program: InlinedProgram) -> None:
        self._program = program

    def take(self, indices: Sequence[int], placement: Sharding) -> Values:
        made = self._program
        values = dict(zip(made.constvars, made.consts, strict=True))
        return _run(_slice(made, indices), values, placement) if indices else ()


def _source(given: Any) -> _Source:
    if is_function(given):
        return _Made(inline.trace(given)[0])
    return _Given(given)


def _slice(program: InlinedProgram, indices: Sequence[int]) -> Program:
    """What makes some of a program's outputs."""
    wanted = tuple(program.outvars[i] for i in indices)
    return sliced(program.equations, {"made": wanted})


def _run(program: Program, values: dict[Any, Any], placement: Sharding) -> Values:
    reads = program.reads

    def run(read: Values) -> Values:
        return program.run(dict(zip(reads, read, strict=True)))["made"]

    return jit_on(run, placement)(tuple(values[var] for var in reads))
