"""An optax optimizer, cut at the same places as the model.

The update of the whole parameter tree is traced once and sliced by the data flow to each stage's
new parameters, so that every transformation works, however it treats the structure of the tree
(masks, labels, schedules, factored moments). Most slice cleanly. Transformations that mix leaves,
such as clipping by the global norm, need values of other stages: these become exchanges between
*phases* of the update:

    phase 0   every stage computes the values that the others need (the sum of squares of its
              gradients)
    phase 1   every stage has all of them, and computes its new parameters

An optimizer that mixes nothing has one phase and exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optax

from pdjax.split.supply import Demand, Supply
from pdjax.split.traced_update import TracedUpdate, trace_update
from pdjax.trace import dataflow, jaxprs
from pdjax.trace.jaxprs import Atom, Equation, Var
from pdjax.trace.program import Program, sliced


@dataclass(frozen=True, eq=False)
class StageUpdate:
    """The part of the update that one stage runs.

    Attributes:
        params: indices of the parameter leaves that it holds.
        state: indices of the leaves of the optimizer state that it holds.
        phases: a program for each phase. All but the last make ``sends``; the last makes
            ``params`` and ``state``.
        receives: for each phase but the first, the values it newly reads, and their stages.
    """

    params: tuple[int, ...]
    state: tuple[int, ...]
    phases: tuple[Program, ...]
    receives: tuple[tuple[tuple[Var, int], ...], ...]


@dataclass(frozen=True, eq=False)
class UpdateSplit:
    """An optimizer's update, cut into stages.

    Attributes:
        params: a variable for each parameter leaf.
        grads: a variable for each gradient leaf; that of a tied parameter is the sum over its
            stages, which is there from phase 1 on.
        state: a variable for each leaf of the optimizer state.
        stages: the part of each stage.
        state_tree: the structure of the optimizer state.
        consts: the arrays that the optimizer closed over.
        num_minibatches: a variable for the number of minibatches that an update is made for; None
            if that is always one.
        mixes: a sentence that says how the optimizer mixes stages, or None if it does not.
    """

    params: tuple[Var, ...]
    grads: tuple[Var, ...]
    state: tuple[Var, ...]
    stages: tuple[StageUpdate, ...]
    state_tree: Any
    consts: dict[Var, Any]
    num_minibatches: Var | None
    mixes: str | None


def split_update(
    optimizer: optax.GradientTransformation,
    params: Any,
    homes: Sequence[Sequence[int]],
    param_names: tuple[str, ...],
    num_stages: int,
    *,
    rounds: bool = False,
    scales: Sequence[float] | None = None,
) -> UpdateSplit:
    """Cuts ``optimizer.update`` followed by ``optax.apply_updates`` into stages.

    Args:
        optimizer: any optax transformation whose update takes (gradients, state, params).
        params: the whole parameter tree, or its shapes.
        homes: for each parameter leaf the stages that hold it.
        param_names: the path of each parameter leaf.
        num_stages: number of stages.
        rounds: whether an update may be made for several minibatches. The counts by which learning
            rates and other hyperparameters are scheduled then go on by as many.
        scales: for each parameter leaf a factor on its learning rate; 1 if not given.

    Raises:
        ValueError: if the update needs more than (gradients, state, params), or has side effects.
    """
    update = trace_update(optimizer, params, rounds=rounds, scales=scales)
    return _UpdatePlacer(update, homes, num_stages).place(param_names)


class _UpdatePlacer:
    """Decides where each value of an update is computed, and when it is exchanged.

    Three stages with one parameter each, w0, w1, w2, and SGD with clipping by the global norm:

        s_i = sum(g_i²);  n = s0 + s1 + s2;  c = min(1, 1 / sqrt n);  w_i' = w_i − η c g_i

    1. Homes: w_i and g_i live on stage i. A leaf of the optimizer state lives with the parameters
       that it helps to update.
    2. Where each value may be computed: s_i on i. n mixes stages and is made of numbers alone: it
       may be computed on every stage. w_i' is made of the array g_i: on i.
    3. Supply: stage i must have w_i', so it must have c and n, so s_0 … s_2: each s_i is computed
       on i and sent to the other two.
    4. Phases: a value that a stage computes of its own values is of phase 0 (s_i); a value of
       phase p is received in phase p + 1; a value computed of others is of the latest of their
       phases: n, c and w_i' are of phase 1.

    Attributes:
        homes: for each parameter, gradient and leaf of the state the stages that hold it.
        available: for each value the stages on which it may be computed.
    """

    def __init__(
        self, update: TracedUpdate, homes: Sequence[Sequence[int]], num_stages: int
    ) -> None:
        self.update = update
        self.num_stages = num_stages
        self.flow = update.program.flow
        stages = list(map(frozenset, homes))
        self.homes = dict(zip(update.params, stages, strict=True))
        self.homes |= dict(zip(update.grads, stages, strict=True))
        self.homes |= self._state_homes()
        self.available = self._find_available()
        self.supply = Supply(self.flow, num_stages, self._source)

    def place(self, param_names: tuple[str, ...]) -> UpdateSplit:
        update, stages = self.update, range(self.num_stages)
        wants = [[(var, s) for var in jaxprs.variables(self._wanted(s))] for s in stages]
        for demands in wants:
            self.supply.add(demands)
        phase = self._find_phases()
        last = max((phase[demand] for demands in wants for demand in demands), default=0)
        return UpdateSplit(
            params=update.params,
            grads=update.grads,
            state=update.state,
            stages=tuple(self._stage(s, 1 + last, phase) for s in stages),
            state_tree=update.state_tree,
            consts=dict(zip(update.program.constvars, update.program.consts, strict=True)),
            num_minibatches=update.num_minibatches,
            mixes=self._describe_mixing(param_names),
        )

    # -------- where things are

    def _state_homes(self) -> dict[Var, frozenset[int]]:
        """A leaf of the state lives with the parameters that it helps to update.

        It helps a parameter that is reached through values no smaller than the leaf: a moment helps
        its own parameter, even where all of them meet in a norm; a step counter helps them all.
        """
        update = self.update
        homes: dict[Var, frozenset[int]] = {}
        for var in update.state:
            reached = self._reach(var)
            helped = [
                self.homes[param]
                for param, new in zip(update.params, update.new_params, strict=True)
                if isinstance(new, Var) and new in reached
            ]
            if helped:
                homes[var] = frozenset().union(*helped)
        return homes | self._homes_of_bystanders(homes)

    def _reach(self, root: Var) -> set[Var]:
        """The values that depend on `root` through values that are no smaller."""
        size = jaxprs.num_elements(root)
        return self.flow.reachable([root], lambda _, var: jaxprs.num_elements(var) >= size)

    def _homes_of_bystanders(self, known: dict[Var, frozenset[int]]) -> dict[Var, frozenset[int]]:
        """Where leaves live that help no parameter: with the largest leaf that they are made from.

        That may be another such leaf, as in a line of past gradients.
        """
        homes = self.homes | known
        waiting = {
            var: new
            for var, new in zip(self.update.state, self.update.new_state, strict=True)
            if var not in known
        }
        while sources := {
            var: source
            for var, new in waiting.items()
            if (source := self._largest_source(new, homes)) is not None
        }:
            homes |= {var: homes[source] for var, source in sources.items()}
            waiting = {var: new for var, new in waiting.items() if var not in sources}
        return homes | dict.fromkeys(waiting, frozenset([0]))

    def _inputs_behind(self, atom: Atom) -> list[Var]:
        """The inputs of the update that a value is computed from."""
        equations = [self.flow.equations[i] for i in self.flow.needed([atom])]
        return dataflow.free_variables(equations, [atom])

    def _largest_source(self, new: Atom, among: Container[Var]) -> Var | None:
        """Of the inputs that `new` is made from, the largest."""
        sources = [var for var in self._inputs_behind(new) if var in among]
        return max(sources, key=jaxprs.num_elements, default=None)

    def _find_available(self) -> dict[Var, frozenset[int]]:
        """For each value the stages on which it may be computed."""
        everywhere = frozenset(range(self.num_stages))
        start = {var: _Availability(stages) for var, stages in self.homes.items()}
        start |= dict.fromkeys(self.update.program.constvars, _Availability(everywhere))
        if self.update.num_minibatches is not None:
            start[self.update.num_minibatches] = _Availability(everywhere)
        rule = partial(_available, everywhere)
        facts = self.flow.propagate(start, rule)
        return {var: fact.stages for var, fact in facts.items()}

    # -------- where and when values are computed

    def _wanted(self, stage: int) -> list[Atom]:
        """The outputs of the update that a stage keeps: its parameters, then its state."""
        outputs = self._outputs(stage)
        return [*outputs["params"], *outputs["state"]]

    def _source(self, var: Var, stage: int) -> int:
        """The stage that computes `var` for `stage`."""
        return stage if stage in self.available[var] else min(self.available[var])

    def _find_phases(self) -> dict[Demand, int]:
        """The phase in which a value is there on a stage: one later for each hop.

        phase(input, home)       = 0; of the gradient of a tied parameter, a sum over stages, 1
        phase(result, stage)     = the largest phase of the inputs of its equation there
        phase(received, target)  = phase(received, source) + 1
        """
        makers, transfers = self.flow.makers, self.supply.transfers
        tied = {var for var in self.update.grads if len(self.homes[var]) > 1}
        phase = {
            (var, stage): int(var in tied)
            for var, stages in self.available.items()
            if var not in makers
            for stage in stages
        }

        def receive(var: Var) -> None:
            if (transfer := transfers.get(var)) is not None:
                arrival = phase[var, transfer.source] + 1
                phase.update(dict.fromkeys(((var, t) for t in transfer.targets), arrival))

        for var in [var for var in transfers if var not in makers]:
            receive(var)
        for index, equation in enumerate(self.flow.equations):
            inputs = self.flow.inputs[index]
            for stage in range(self.num_stages):
                if index in self.supply.run[stage]:
                    ready = max((phase[var, stage] for var in inputs), default=0)
                    phase |= {(var, stage): ready for var in equation.outvars}
            for var in equation.outvars:
                receive(var)
        return phase

    def _stage(self, stage: int, num_phases: int, phase: dict[Demand, int]) -> StageUpdate:
        update = self.update
        sends, receives = self._exchanges(stage, num_phases, phase)
        equations = [self.flow.equations[i] for i in sorted(self.supply.run[stage])]
        inputs = (*update.params, *update.grads, *update.state)
        phases, known = [], [var for var in inputs if stage in self.homes[var]]
        for index in range(num_phases):
            known += [var for var, _ in receives[index] if var not in update.grads]
            outputs: dict[str, tuple[Any, ...]] = {"sends": tuple(sends[index])}
            if index == num_phases - 1:
                outputs = self._outputs(stage)
            phases.append(sliced(equations, outputs, known))
        return StageUpdate(
            params=tuple(i for i, var in enumerate(update.params) if stage in self.homes[var]),
            state=tuple(i for i, var in enumerate(update.state) if stage in self.homes[var]),
            phases=tuple(phases),
            receives=tuple(tuple(group) for group in receives),
        )

    def _exchanges(
        self, stage: int, num_phases: int, phase: dict[Demand, int]
    ) -> tuple[list[list[Var]], list[list[tuple[Var, int]]]]:
        """For each phase the values that a stage sends, and its received values with their stages.

        The stages of a tied parameter send each other their parts of its gradient in phase 0.
        """
        sends: list[list[Var]] = [[] for _ in range(num_phases)]
        receives: list[list[tuple[Var, int]]] = [[] for _ in range(num_phases)]
        for var, transfer in self.supply.transfers.items():
            if transfer.source == stage:
                sends[phase[var, stage]].append(var)
            if stage in transfer.targets:
                receives[phase[var, stage]].append((var, transfer.source))
        for var in self.update.grads:
            if len(self.homes[var]) > 1 and stage in self.homes[var]:
                sends[0].append(var)
                receives[1] += [(var, peer) for peer in sorted(self.homes[var] - {stage})]
        return sends, receives

    def _outputs(self, stage: int) -> dict[str, tuple[Any, ...]]:
        """The new values of the parameters and of the state that a stage holds."""
        update = self.update
        groups = {
            "params": (update.params, update.new_params),
            "state": (update.state, update.new_state),
        }
        return {
            name: tuple(n for o, n in zip(old, new, strict=True) if stage in self.homes[o])
            for name, (old, new) in groups.items()
        }

    def _describe_mixing(self, param_names: tuple[str, ...]) -> str | None:
        """A sentence about the first value that travels, or None if none does."""
        grads = self.update.grads
        names = dict(zip((*grads, *self.update.params), param_names * 2, strict=True))
        for var, transfer in self.supply.transfers.items():
            behind = set(self._inputs_behind(var))
            leaf = next((leaf for leaf in names if leaf in behind), None)
            what = "gradient" if leaf in grads else "value"
            name = f" of {names[leaf]!r}" if leaf in names else ""
            return (
                f"the update of the parameters on stage {min(transfer.targets)} depends on the "
                f"{what}{name} on stage {transfer.source}"
            )
        return None


@dataclass(frozen=True)
class _Availability:
    """The stages on which a value may be computed, and whether it mixes values of several."""

    stages: frozenset[int]
    mixed: bool = False


def _available(
    everywhere: frozenset[int], equation: Equation, reads: dict[Var, _Availability]
) -> _Availability:
    """Where the results of an equation may be computed.

    1. As long as one stage has all their inputs: on that stage.
    2. If they mix stages: where the arrays are that they are made of, and the numbers that they
       take besides are sent there; if they are made of numbers alone, on every stage.
    3. If the arrays are on different stages: where the largest is.
    """
    arrays = [var for var in reads if jaxprs.num_elements(var) > 1]
    stages = everywhere.intersection(*(fact.stages for fact in reads.values()))
    mixed = not stages or any(fact.mixed for fact in reads.values())
    if mixed:
        stages = everywhere.intersection(*(reads[var].stages for var in arrays))
    if not stages:
        stages = reads[max(arrays, key=jaxprs.num_elements)].stages
    return _Availability(stages, mixed)
