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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pdjax.split.state_placement import place_state, state_conflict
from pdjax.split.supply import Demand, Supply
from pdjax.trace import jaxprs
from pdjax.trace.dataflow import Fact
from pdjax.trace.jaxprs import Atom, Equation, Var
from pdjax.trace.layers import LayerGraph
from pdjax.trace.loss_fn import TracedLoss, ValueKind


@dataclass(frozen=True, eq=False)
class Stage:
    """The equations of one stage, for one microbatch.

    Inputs, in this order: `params`, `consts`, `state`, `batch`, the key (if `uses_key`),
    `receives`. Outputs: `sends`, the new values of `updates`, `outputs`.

    Attributes:
        index: number of the stage, from 0.
        equations: its equations in program order.
        params: positions of the parameters that it holds, in `TracedLoss.params`.
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
        homes: for each parameter the stages that hold it, ascending; several where tied.
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
            read a mutable state from its writers.
    """
    _check_cuts(graph, first_layers)
    stage_of = _stage_of_equations(graph, first_layers)
    num_stages = len(first_layers)
    place_state(graph.traced, stage_of)
    return _StagePlacer(graph.traced, stage_of, num_stages).place()


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


class _StagePlacer:
    """Finds for every value where it is computed, and for every parameter where it is held.

    Attributes:
        stage_of: for each equation of the line, by its position, the stage that runs it.
        behind: for each PARAMETER value the parameters that it is computed from.
        homes: for each parameter the stages that hold it for their own equations, or the one
            that holds it for the others.
        earliest: for each PARAMETER value the first stage on which it can be computed.
    """

    def __init__(self, traced: TracedLoss, stage_of: dict[int, int], num_stages: int) -> None:
        self.traced = traced
        self.stage_of = stage_of
        self.num_stages = num_stages
        self.behind = _parameters_behind(traced)
        self.homes = self._find_homes()
        self.earliest = self._find_earliest()
        self.supply = Supply(traced.flow, num_stages, self._source)

    def place(self) -> StageSplit:
        """Cuts the loss function.

        A chain of three layers with an L2 term, h1 = f(x, w0), h2 = f(h1, w1), loss = f(h2, w2) +
        |w0|, one layer a stage:

        1. `stage_of` gives each equation of the line its stage: h1 to 0, h2 to 1, the loss to 2.
        2. The parameters' homes follow: w0 on 0, w1 on 1, w2 on 2.
        3. Each stage must have the values that its equations read, and each result and each new
           state must be on the stage that makes it (demands): (x, 0), (w0, 0), (h1, 1), …,
           (|w0|, 2).
        4. The supply finds the other equations that must run, and the values that must travel:
           h1 goes 0 → 1, h2 goes 1 → 2. |w0| is a summary: it is computed on 0, where w0 is held,
           and goes 0 → 2.
        5. A parameter that a stage reads on the way gets that stage as one more home.
        """
        results = results_of(self.traced)
        result_stages = [self._stage_of_result(atom) for atom in results]
        update_stages = self._state_writers()
        self.supply.add(
            [
                *self._demands_of_line(),
                *_demands(results, result_stages),
                *_demands(self.traced.new_state, update_stages),
            ]
        )
        homes = self._all_homes()
        for var, stages in zip(self.traced.params, homes, strict=True):
            for stage in stages:
                self.supply.inputs[stage].add(var)
        self._check_state(update_stages)
        return StageSplit(
            traced=self.traced,
            stages=tuple(
                self._stage(stage, update_stages, result_stages) for stage in range(self.num_stages)
            ),
            homes=homes,
            active_values=_active_values(self.traced),
        )

    def _demands_of_line(self) -> list[Demand]:
        """Every equation of the line runs on its stage, which must have all that it reads."""
        for position, stage in self.stage_of.items():
            self.supply.run[stage].add(position)
        return [
            (var, stage)
            for position, stage in self.stage_of.items()
            for var in self.traced.equations[position].invars
            if isinstance(var, Var)
        ]

    def _find_homes(self) -> dict[Var, set[int]]:
        """Each parameter is held by the stages that compute with it, or by one.

        1. The stages whose line reads it at full size.
        2. If there are none: the first stage that needs a value made from it.
        3. If there is none: the stage of the parameter before it.
        """
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
        for var in self.traced.params:
            homes[var] = homes[var] or {first_need.get(var, neighbour)}
            neighbour = min(homes[var])
        return homes

    def _all_homes(self) -> tuple[tuple[int, ...], ...]:
        """The homes of each parameter, those included that the supply found to need it."""
        return tuple(
            tuple(stage for stage in range(self.num_stages) if self._is_held(var, stage))
            for var in self.traced.params
        )

    def _is_held(self, param: Var, stage: int) -> bool:
        return stage in self.homes[param] or param in self.supply.inputs[stage]

    def _find_earliest(self) -> dict[Var, int]:
        """The first stage on which a PARAMETER value can be computed: the last of its inputs'."""
        starts = {var: min(homes) for var, homes in self.homes.items()}
        return _propagate_params(self.traced, starts, max)

    def _stage_of_result(self, atom: Atom) -> int | None:
        """The stage that makes a result of the loss function; None for a literal."""
        if not isinstance(atom, Var):
            return None
        position = self.traced.flow.makers.get(atom, -1)
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
        position = self.traced.flow.makers.get(new, -1) if isinstance(new, Var) else -1
        if position in self.stage_of:
            return self.stage_of[position]
        readers = [
            self.stage_of[position]
            for position in self.traced.flow.readers.get(old, ())
            if position in self.stage_of
        ]
        if not readers and isinstance(new, Var) and self.traced.kind(new) is ValueKind.PARAMETER:
            return self.earliest[new]
        return max(readers, default=self.num_stages - 1)

    def _source(self, var: Var, stage: int) -> int:
        """The stage that computes `var` for `stage`.

        A value of the line is computed on its stage; a summary where its parameters are held, if
        that is an earlier stage; everything else where it is read.
        """
        position = self.traced.flow.makers.get(var)
        if position is None:
            return stage
        if position in self.stage_of:
            return self.stage_of[position]
        if var in self.traced.summaries and self.earliest[var] < stage:
            held_here = all(self._is_held(param, stage) for param in self.behind[var])
            return stage if held_here else self.earliest[var]
        return stage

    def _check_state(self, writers: Sequence[int | None]) -> None:
        for index, writer in enumerate(writers):
            for stage in range(self.num_stages):
                reads = self.traced.state[index] in self.supply.inputs[stage]
                if reads and writer not in (None, stage):
                    raise ValueError(state_conflict(self.traced, index, stage, writer))

    def _stage(
        self, stage: int, updates: Sequence[int | None], results: Sequence[int | None]
    ) -> Stage:
        traced, transfers, inputs = self.traced, self.supply.transfers, self.supply.inputs[stage]
        in_order = sorted(transfers, key=traced.flow.makers.__getitem__)
        receives = [var for var in in_order if stage in transfers[var].targets]
        sends = [var for var in in_order if transfers[var].source == stage]

        def used(group: Sequence[Var]) -> tuple[int, ...]:
            return tuple(i for i, var in enumerate(group) if var in inputs)

        return Stage(
            index=stage,
            equations=tuple(traced.equations[i] for i in sorted(self.supply.run[stage])),
            params=used(traced.params),
            consts=used(traced.program.constvars),
            state=used(traced.state),
            batch=used(traced.batch),
            uses_key=traced.key in inputs,
            receives=tuple(receives),
            sources=tuple(transfers[var].source for var in receives),
            sends=tuple(sends),
            targets=tuple(tuple(sorted(transfers[var].targets)) for var in sends),
            updates=tuple(i for i, writer in enumerate(updates) if writer == stage),
            outputs=tuple(i for i, maker in enumerate(results) if maker == stage),
        )


def _demands(atoms: Sequence[Atom], stages: Sequence[int | None]) -> list[Demand]:
    """Each of `atoms` on its stage, without literals and without those of no stage."""
    pairs = zip(atoms, stages, strict=True)
    return [(atom, s) for atom, s in pairs if isinstance(atom, Var) and s is not None]


def _parameters_behind(traced: TracedLoss) -> dict[Var, frozenset[Var]]:
    """For each PARAMETER value the parameters that it is computed from."""
    start = {var: frozenset([var]) for var in traced.params}
    return _propagate_params(traced, start, lambda behind: frozenset().union(*behind))


def _propagate_params(
    traced: TracedLoss, start: dict[Var, Fact], combine: Callable[[Iterable[Fact]], Fact]
) -> dict[Var, Fact]:
    """Carries a fact about each parameter to the PARAMETER values."""

    def of_params(equation: Equation, reads: dict[Var, Fact]) -> Fact | None:
        is_made = any(traced.kind(var) is ValueKind.PARAMETER for var in equation.outvars)
        return combine(reads.values()) if is_made else None

    return traced.flow.propagate(start, of_params)


def _active_values(traced: TracedLoss) -> frozenset[Var]:
    """The values through which the gradient of the loss flows.

    As in the activity analysis of automatic differentiation, a value is active if it is *varied*
    (it depends on a parameter) and *useful* (the loss depends on it), both by real numbers and
    through equations that have a derivative.
    """

    def has_derivative(position: int, var: Var) -> bool:
        return jaxprs.is_inexact(var) and not jaxprs.blocks_gradient(traced.equations[position])

    varied = traced.flow.reachable(traced.params, has_derivative)
    useful = traced.flow.sources([traced.loss], has_derivative)
    return frozenset(varied & useful)
