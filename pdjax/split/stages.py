"""From a line of layers to stages.

`split` gives every equation to the stages that run it and every parameter to the stages that hold
it, and notes which values travel:

    LINE        runs on the one stage whose run of layers it belongs to
    FREE        is repeated on every stage that needs it
    PARAMETER   is repeated where its parameters are held; a *summary* of them (an L2 term, a
                norm) is computed there and sent instead
    state       belongs to the stage that updates it

A value made on one stage and read on a later one is sent directly from the first to the second,
however many stages lie between.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pdjax.split.state_placement import place_state, state_conflict
from pdjax.trace import jaxprs
from pdjax.trace.jaxprs import Atom, Equation, Var
from pdjax.trace.layers import LayerGraph
from pdjax.trace.loss_fn import TracedLoss, ValueKind


@dataclass(frozen=True, eq=False)
class Stage:
    """What one stage computes for one microbatch, as equations.

    Inputs, in this order: `params`, `consts`, `state`, `batch`, the key (if `uses_key`),
    `receives`. Outputs: `sends`, the new values of `updates`, `outputs`.

    Attributes:
        index: number of the stage, from 0.
        equations: its equations in program order.
        params: indices of the parameter leaves that it holds.
        consts: indices of the closed-over arrays that it reads.
        state: indices of the leaves of the mutable state that it reads.
        batch: indices of the batch leaves that it reads.
        uses_key: whether it reads the random key.
        receives: values made by earlier stages.
        sources: for each of `receives` the stage that makes it.
        sends: values that later stages read.
        targets: for each of `sends` the stages that read it, ascending.
        updates: indices of the leaves of the mutable state that it writes.
        outputs: positions among the loss function's results that it makes
            (see `StageSplit.results`).
    """

    index: int
    equations: tuple[Equation, ...] = field(repr=False)
    params: tuple[int, ...]
    consts: tuple[int, ...]
    state: tuple[int, ...]
    batch: tuple[int, ...]
    uses_key: bool
    receives: tuple[Var, ...]
    sources: tuple[int, ...]
    sends: tuple[Var, ...]
    targets: tuple[tuple[int, ...], ...]
    updates: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class StageSplit:
    """A traced loss function cut into stages.

    Attributes:
        traced: the loss function.
        stages: the stages, in order.
        homes: for each parameter leaf the stages that hold it, ascending; several where tied.
        active_values: the values through which the gradient of the loss flows.
    """

    traced: TracedLoss
    stages: tuple[Stage, ...]
    homes: tuple[tuple[int, ...], ...]
    active_values: frozenset[Var]

    @property
    def results(self) -> tuple[Atom, ...]:
        """The loss function's results: the loss, its weight if it has one, the metrics."""
        return results_of(self.traced)


def results_of(traced: TracedLoss) -> tuple[Atom, ...]:
    """The loss, its weight if it has one, then the flat metrics."""
    weight = () if traced.weight is None else (traced.weight,)
    return (traced.loss, *weight, *traced.metrics)


def split(graph: LayerGraph, first_layers: Sequence[int]) -> StageSplit:
    """Cuts `graph` into ``len(first_layers)`` stages.

    Args:
        graph: the layers.
        first_layers: for each stage the index of its first layer, in order from 0. A stage that
            begins where the next one does is empty.

    Raises:
        ValueError: if the cuts are not layer indices in order, or separate the equations that
            read a mutable state from those that write it.
    """
    _check_cuts(graph, first_layers)
    stage_of = _stage_of_equations(graph, first_layers)
    num_stages = len(first_layers)
    place_state(graph.traced, stage_of)
    placer = _Placer(graph.traced, stage_of, num_stages)
    return placer.place()


def _check_cuts(graph: LayerGraph, first_layers: Sequence[int]) -> None:
    in_order = all(a <= b for a, b in pairwise(first_layers))
    if not first_layers or first_layers[0] != 0 or not in_order:
        raise ValueError(
            f"a stage starts at each of the layers {list(first_layers)}; expected layer indices "
            "in order that begin with 0."
        )
    if first_layers[-1] > len(graph.layers):
        raise ValueError(
            f"a stage starts at layer {first_layers[-1]}, but the model has only "
            f"{len(graph.layers)} layers (0 to {len(graph.layers) - 1}): use fewer stages."
        )


def _stage_of_equations(graph: LayerGraph, first_layers: Sequence[int]) -> dict[int, int]:
    """For each equation of the line (by its position in the program) its stage."""
    stage_of = {}
    for number, layer in enumerate(graph.layers):
        stage = bisect_right(first_layers, number) - 1
        stage_of |= dict.fromkeys(graph.line[layer.start : layer.stop], stage)
    return stage_of


# ---------------------------------------------------------------- placement


class _Placer:
    """Finds for every value where it is computed, and for every parameter where it is held."""

    def __init__(self, traced: TracedLoss, stage_of: dict[int, int], num_stages: int) -> None:
        self.traced = traced
        self.stage_of = stage_of
        self.num_stages = num_stages
        self.behind = _parameters_behind(traced)
        self.homes = self._find_homes()
        self.earliest = self._find_earliest()
        self.run: list[set[int]] = [set() for _ in range(num_stages)]
        self.inputs: list[set[Var]] = [set() for _ in range(num_stages)]
        self.sent: dict[Var, tuple[int, set[int]]] = {}

    def place(self) -> StageSplit:
        results = results_of(self.traced)
        result_stages = [self._stage_of_result(atom) for atom in results]
        update_stages = self._state_writers()
        wanted: list[tuple[Atom, int | None]] = [
            (atom, stage)
            for position, stage in self.stage_of.items()
            for atom in self.traced.equations[position].invars
        ]
        wanted += zip(results, result_stages, strict=True)
        wanted += zip(self.traced.new_state, update_stages, strict=True)
        for position, stage in self.stage_of.items():
            self.run[stage].add(position)
        self._supply([(atom, s) for atom, s in wanted if isinstance(atom, Var) and s is not None])
        for var, homes in self.homes.items():
            for stage in homes:
                self.inputs[stage].add(var)
        self._check_state(update_stages)
        stages = [
            self._stage(stage, update_stages, result_stages) for stage in range(self.num_stages)
        ]
        return StageSplit(
            traced=self.traced,
            stages=tuple(stages),
            homes=tuple(tuple(sorted(self.homes[var])) for var in self.traced.params),
            active_values=_active_values(self.traced),
        )

    def _find_homes(self) -> dict[Var, set[int]]:
        """Each parameter is held by the stages that compute with it, or that need it first."""
        homes: dict[Var, set[int]] = {var: set() for var in self.traced.params}
        first_need: dict[Var, int] = {}
        for position, stage in self.stage_of.items():
            atoms = self.traced.equations[position].invars
            for var in self.traced.wide_params(atoms):
                homes[var].add(stage)
            for atom in jaxprs.variables(atoms):
                for var in self.behind.get(atom, ()):
                    first_need[var] = min(first_need.get(var, stage), stage)
        neighbour = 0
        for var in self.traced.params:  # a parameter nobody uses stays with its neighbour
            homes[var] = homes[var] or {first_need.get(var, neighbour)}
            neighbour = min(homes[var])
        return homes

    def _find_earliest(self) -> dict[Var, int]:
        """The first stage on which a PARAMETER value can be computed."""
        earliest = {var: min(homes) for var, homes in self.homes.items()}
        for equation in self.traced.equations:
            for var in equation.outvars:
                if self.traced.kind(var) is ValueKind.PARAMETER:
                    inputs = jaxprs.variables(equation.invars)
                    earliest[var] = max(earliest.get(atom, 0) for atom in inputs)
        return earliest

    def _stage_of_result(self, atom: Atom) -> int | None:
        """Where a result of the loss function is made; None for a literal."""
        if not isinstance(atom, Var):
            return None
        position = self.traced.maker.get(atom, -1)
        if position in self.stage_of:
            return self.stage_of[position]
        if self.traced.kind(atom) is ValueKind.PARAMETER:
            return self.earliest[atom]
        if atom in self.traced.state:
            return self._state_stage(self.traced.state.index(atom))
        return self.num_stages - 1

    def _state_writers(self) -> list[int | None]:
        """For each leaf of the state the stage that updates it; None if it never changes."""
        pairs = zip(self.traced.state, self.traced.new_state, strict=True)
        return [
            None if new is old else self._state_stage(index)
            for index, (old, new) in enumerate(pairs)
        ]

    def _state_stage(self, index: int) -> int:
        """The stage that a leaf of the state belongs to: its writer's, or its last reader's."""
        old, new = self.traced.state[index], self.traced.new_state[index]
        position = self.traced.maker.get(new, -1) if isinstance(new, Var) else -1
        if position in self.stage_of:
            return self.stage_of[position]
        readers = [
            self.stage_of[position]
            for position in self.traced.readers.get(old, ())
            if position in self.stage_of
        ]
        if not readers and isinstance(new, Var) and self.traced.kind(new) is ValueKind.PARAMETER:
            return self.earliest[new]
        return max(readers, default=self.num_stages - 1)

    def _supply(self, pending: list[tuple[Var, int]]) -> None:
        """Makes every (value, stage) of `pending` available, and all that this takes."""
        done: set[tuple[Var, int]] = set()
        while pending:
            want = pending.pop()
            if want in done:
                continue
            done.add(want)
            var, stage = want
            source = self._source(var, stage)
            if source != stage:
                self.sent.setdefault(var, (source, set()))[1].add(stage)
                pending.append((var, source))
            elif var in self.traced.maker:
                position = self.traced.maker[var]
                self.run[stage].add(position)
                inputs = jaxprs.variables(self.traced.equations[position].invars)
                pending += [(atom, stage) for atom in inputs]
            else:
                self.inputs[stage].add(var)
                if var in self.homes:
                    self.homes[var].add(stage)

    def _source(self, var: Var, stage: int) -> int:
        """The stage that computes `var` for `stage`."""
        if var not in self.traced.maker:
            return stage
        if self.traced.maker[var] in self.stage_of:
            return self.stage_of[self.traced.maker[var]]
        if var in self.traced.summaries and self.earliest[var] < stage:
            held_here = all(stage in self.homes[param] for param in self.behind[var])
            return stage if held_here else self.earliest[var]
        return stage

    def _check_state(self, writers: Sequence[int | None]) -> None:
        for index, writer in enumerate(writers):
            for stage in range(self.num_stages):
                reads = self.traced.state[index] in self.inputs[stage]
                if reads and writer not in (None, stage):
                    raise ValueError(state_conflict(self.traced, index, stage, writer))

    def _stage(
        self, stage: int, updates: Sequence[int | None], results: Sequence[int | None]
    ) -> Stage:
        traced = self.traced
        receives = [var for var, (_, targets) in self.sent.items() if stage in targets]
        sends = [var for var, (source, _) in self.sent.items() if source == stage]
        receives.sort(key=traced.maker.__getitem__)
        sends.sort(key=traced.maker.__getitem__)

        def used(group: Sequence[Var]) -> tuple[int, ...]:
            return tuple(i for i, var in enumerate(group) if var in self.inputs[stage])

        return Stage(
            index=stage,
            equations=tuple(traced.equations[i] for i in sorted(self.run[stage])),
            params=used(traced.params),
            consts=used(traced.program.constvars),
            state=used(traced.state),
            batch=used(traced.batch),
            uses_key=traced.key in self.inputs[stage],
            receives=tuple(receives),
            sources=tuple(self.sent[var][0] for var in receives),
            sends=tuple(sends),
            targets=tuple(tuple(sorted(self.sent[var][1])) for var in sends),
            updates=tuple(i for i, writer in enumerate(updates) if writer == stage),
            outputs=tuple(i for i, maker in enumerate(results) if maker == stage),
        )


def _parameters_behind(traced: TracedLoss) -> dict[Var, frozenset[Var]]:
    """For each PARAMETER value all the parameters that it depends on."""
    behind = {var: frozenset([var]) for var in traced.params}
    for equation in traced.equations:
        for var in equation.outvars:
            if traced.kind(var) is ValueKind.PARAMETER:
                inputs = jaxprs.variables(equation.invars)
                behind[var] = frozenset().union(*(behind.get(atom, ()) for atom in inputs))
    return behind


def _active_values(traced: TracedLoss) -> frozenset[Var]:
    """The values that depend on a parameter, and the loss on them, in a differentiable way."""
    varied = set(traced.params)
    for equation in traced.equations:
        reads_varied = varied.intersection(jaxprs.variables(equation.invars))
        if reads_varied and not jaxprs.blocks_gradient(equation):
            varied.update(var for var in equation.outvars if jaxprs.is_inexact(var))
    useful = set(jaxprs.variables([traced.loss]))
    for equation in reversed(traced.equations):
        if useful.intersection(equation.outvars) and not jaxprs.blocks_gradient(equation):
            inputs = jaxprs.variables(equation.invars)
            useful.update(var for var in inputs if jaxprs.is_inexact(var))
    return frozenset(varied & useful)
