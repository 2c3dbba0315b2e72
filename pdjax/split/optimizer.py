"""An optax optimizer, cut at the same places as the model.

The update of the whole parameter tree is traced once and sliced by what each stage's new parameters
depend on, so that every transformation works, whatever it does with the structure of the tree
(masks, labels, schedules, factored moments). Most slice cleanly. Those that mix leaves, such as
clipping by the global norm, need values of other stages: these are found by data flow and become
exchanges between *phases* of the update:

    phase 0   every stage computes what the others need of it (the sum of squares of its gradients)
    phase 1   every stage has all of them, and computes its new parameters

An optimizer that mixes nothing has one phase and exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pdjax.trace import inline, jaxprs
from pdjax.trace.inline import InlinedProgram
from pdjax.trace.jaxprs import Equation, Var
from pdjax.trace.program import Program


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
        stages: what each stage runs.
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
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: params))
    state_leaves, state_tree = jax.tree.flatten(jax.eval_shape(optimizer.init, params))

    counts = schedule_counts(jax.tree.unflatten(state_tree, range(len(state_leaves))))
    rounds = rounds and bool(counts)

    def update(
        p: list[Any], g: list[Any], s: list[Any], num_minibatches: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        old = jax.tree.unflatten(tree, p)
        gradients, state = jax.tree.unflatten(tree, g), jax.tree.unflatten(state_tree, s)
        updates, state = optimizer.update(gradients, state, old)
        if scales is not None:
            flat_updates = zip(jax.tree.leaves(updates), scales, strict=True)
            updates = jax.tree.unflatten(tree, [u if k == 1 else u * k for u, k in flat_updates])
        new = jax.tree.leaves(state)
        for at in counts if rounds else ():
            new[at] = s[at] + (new[at] - s[at]) * num_minibatches[0].astype(s[at].dtype)
        return jax.tree.leaves(optax.apply_updates(old, updates)), new

    extra = [jax.ShapeDtypeStruct((), jnp.int32)] if rounds else []
    try:
        program, _ = inline.trace(
            update, leaves, leaves, state_leaves, extra, branches_as_selects=True
        )
    except TypeError as error:
        raise ValueError(
            f"optimizer.update(gradients, state, params) failed: {error}. pdjax gives an optimizer "
            "these three; one that needs more, such as the loss, cannot be used."
        ) from error
    if any(map(jaxprs.has_effects, program.equations)):
        raise ValueError(
            "the optimizer's update has side effects (callbacks or prints), which cannot be "
            "divided among the stages. Take them out of the optimizer, or put them into loss_fn."
        )
    placer = _UpdatePlacer(program, homes, num_stages, rounds)
    return placer.place(param_names, state_tree)


def schedule_counts(state: Any) -> list[Any]:
    """The counters of an optimizer state by which optax schedules its hyperparameters.

    A moment's own counter, which says how many updates it has seen, is none.
    """
    return [part.count for part in _parts(state) if isinstance(part, _SCHEDULED)]


_SCHEDULED = (
    optax.ScaleByScheduleState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
)


def _parts(state: Any) -> Iterator[Any]:
    """All nodes of an optimizer state."""
    yield state
    children = jax.tree.leaves(state, is_leaf=lambda node: node is not state)
    for child in children if not (len(children) == 1 and children[0] is state) else ():
        yield from _parts(child)


def init_program(
    optimizer: optax.GradientTransformation, params: Any
) -> tuple[InlinedProgram, Any]:
    """The trace of ``optimizer.init`` over the parameter leaves, and the state's structure."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: params))
    return inline.trace(lambda *p: optimizer.init(jax.tree.unflatten(tree, p)), *leaves)


class _UpdatePlacer:
    """Decides where each value of an update is computed, and what is exchanged when."""

    def __init__(
        self,
        program: InlinedProgram,
        homes: Sequence[Sequence[int]],
        num_stages: int,
        rounds: bool,
    ) -> None:
        count = len(homes)
        self.program = program
        self.num_stages = num_stages
        self.params, self.grads = program.invars[:count], program.invars[count : 2 * count]
        self.num_minibatches = program.invars[-1] if rounds else None
        self.state = program.invars[2 * count : len(program.invars) - rounds]
        self.new_params, self.new_state = program.outvars[:count], program.outvars[count:]
        self.maker = {v: i for i, e in enumerate(program.equations) for v in e.outvars}
        self.homes = {v: frozenset(h) for v, h in zip(self.params, homes, strict=True)}
        self.homes |= {v: frozenset(h) for v, h in zip(self.grads, homes, strict=True)}
        self.homes |= self._state_homes()
        self.available = self._find_available()
        self.run: list[set[int]] = [set() for _ in range(num_stages)]
        self.sent: dict[Var, tuple[int, set[int]]] = {}

    def place(self, param_names: tuple[str, ...], state_tree: Any) -> UpdateSplit:
        for stage in range(self.num_stages):
            self._supply(stage)
        phase = self._find_phases()
        wants = [
            (var, s) for s in range(self.num_stages) for var in jaxprs.variables(self._wanted(s))
        ]
        num_phases = 1 + max((phase[want] for want in wants), default=0)
        return UpdateSplit(
            params=self.params,
            grads=self.grads,
            state=self.state,
            stages=tuple(self._stage(s, num_phases, phase) for s in range(self.num_stages)),
            state_tree=state_tree,
            consts=dict(zip(self.program.constvars, self.program.consts, strict=True)),
            num_minibatches=self.num_minibatches,
            mixes=self._describe_mixing(param_names),
        )

    # -------- where things are

    @cached_property
    def _readers(self) -> dict[Var, list[int]]:
        readers: dict[Var, list[int]] = {}
        for index, equation in enumerate(self.program.equations):
            for var in jaxprs.variables(equation.invars):
                readers.setdefault(var, []).append(index)
        return readers

    def _state_homes(self) -> dict[Var, frozenset[int]]:
        """A leaf of the state lives with the parameters that it helps to update.

        What counts is reached through values no smaller than the leaf: a moment helps its own
        parameter, even where all of them meet in a norm; a step counter helps everyone.
        """
        homes: dict[Var, frozenset[int]] = {}
        for var in self.state:
            reached = self._reach(var)
            helped = [
                self.homes[param]
                for param, out in zip(self.params, self.new_params, strict=True)
                if out in reached
            ]
            if helped:
                homes[var] = frozenset().union(*helped)
        return homes | self._homes_of_bystanders(homes)

    def _reach(self, root: Var) -> set[Var]:
        reached, pending = {root}, [root]
        while pending:
            for index in self._readers.get(pending.pop(), ()):
                for var in self.program.equations[index].outvars:
                    large = jaxprs.num_elements(var) >= jaxprs.num_elements(root)
                    if large and var not in reached:
                        reached.add(var)
                        pending.append(var)
        return reached

    def _homes_of_bystanders(self, known: dict[Var, frozenset[int]]) -> dict[Var, frozenset[int]]:
        """Where leaves live that help no parameter: with the largest leaf that they are made from.

        That may be another such leaf, as in a line of past gradients.
        """
        homes = self.homes | known
        waiting = {
            var: new
            for var, new in zip(self.state, self.new_state, strict=True)
            if var not in known
        }
        while found := {
            var: source
            for var, new in waiting.items()
            if (source := self._largest_source(new, homes)) is not None
        }:
            homes |= {var: homes[source] for var, source in found.items()}
            waiting = {var: new for var, new in waiting.items() if var not in found}
        return homes | dict.fromkeys(waiting, frozenset([0]))

    def _largest_source(self, new: jaxprs.Atom, among: Container[Var]) -> Var | None:
        """Of the inputs that `new` is made from, the largest."""
        equations = [self.program.equations[i] for i in self._needed([new])]
        sources = [var for var in jaxprs.free_variables(equations, [new]) if var in among]
        return max(sources, key=jaxprs.num_elements, default=None)

    def _needed(self, wanted: Iterable[jaxprs.Atom]) -> list[int]:
        return jaxprs.needed(self.program.equations, wanted)

    def _find_available(self) -> dict[Var, frozenset[int]]:
        """For each value the stages on which it may be computed.

        As long as it is made of what one stage has, that stage. A value that mixes stages is
        computed where its arrays are, and the numbers that it takes besides are sent there; if it
        is made of numbers alone, on every stage that wants it.
        """
        everywhere = frozenset(range(self.num_stages))
        available = dict(self.homes) | dict.fromkeys(self.program.constvars, everywhere)
        if self.num_minibatches is not None:
            available[self.num_minibatches] = everywhere
        mixed: set[Var] = set()
        for equation in self.program.equations:
            inputs = jaxprs.variables(equation.invars)
            arrays = [var for var in inputs if jaxprs.num_elements(var) > 1]
            stages = everywhere.intersection(*(available[var] for var in inputs))
            if not stages or not mixed.isdisjoint(inputs):
                mixed.update(equation.outvars)
                stages = everywhere.intersection(*(available[var] for var in arrays))
            stages = stages or available[max(arrays, key=jaxprs.num_elements)]
            available.update(dict.fromkeys(equation.outvars, stages))
        return available

    # -------- what runs where and when

    def _wanted(self, stage: int) -> list[jaxprs.Atom]:
        """The outputs of the update that a stage keeps: its parameters, then its state."""
        pairs = [
            *zip(self.params, self.new_params, strict=True),
            *zip(self.state, self.new_state, strict=True),
        ]
        return [new for old, new in pairs if stage in self.homes[old]]

    def _supply(self, stage: int) -> None:
        pending = [(var, stage) for var in jaxprs.variables(self._wanted(stage))]
        done = set()
        while pending:
            var, at = want = pending.pop()
            if want in done:
                continue
            done.add(want)
            if at not in self.available[var]:
                source = min(self.available[var])
                self.sent.setdefault(var, (source, set()))[1].add(at)
                pending.append((var, source))
            elif var in self.maker:
                self.run[at].add(self.maker[var])
                inputs = jaxprs.variables(self.program.equations[self.maker[var]].invars)
                pending += [(atom, at) for atom in inputs]

    def _find_phases(self) -> dict[tuple[Var, int], int]:
        """The phase in which a value is there on a stage: one later for each hop."""
        tied = {var for var in self.grads if len(self.homes[var]) > 1}
        phase = {
            (var, stage): int(var in tied)
            for var, stages in self.available.items()
            if var not in self.maker
            for stage in stages
        }
        for var, (source, targets) in self.sent.items():
            if var not in self.maker:
                phase |= {(var, target): phase[var, source] + 1 for target in targets}
        for index, equation in enumerate(self.program.equations):
            inputs = jaxprs.variables(equation.invars)
            for stage in range(self.num_stages):
                if index in self.run[stage]:
                    ready = max((phase[var, stage] for var in inputs), default=0)
                    phase |= {(var, stage): ready for var in equation.outvars}
            for var in equation.outvars:
                source, targets = self.sent.get(var, (0, ()))
                phase |= {(var, target): phase[var, source] + 1 for target in targets}
        return phase

    def _stage(self, stage: int, num_phases: int, phase: dict[tuple[Var, int], int]) -> StageUpdate:
        sends: list[list[Var]] = [[] for _ in range(num_phases)]
        receives: list[list[tuple[Var, int]]] = [[] for _ in range(num_phases)]
        for var, (source, targets) in self.sent.items():
            if source == stage:
                sends[phase[var, stage]].append(var)
            if stage in targets:
                receives[phase[var, stage]].append((var, source))
        for var in self.grads:
            if len(self.homes[var]) > 1 and stage in self.homes[var]:
                sends[0].append(var)
                receives[1] += [(var, peer) for peer in sorted(self.homes[var] - {stage})]
        equations = [self.program.equations[i] for i in sorted(self.run[stage])]
        held = [v for v in (*self.params, *self.grads, *self.state) if stage in self.homes[v]]
        phases, known = [], list(held)
        for index in range(num_phases):
            known += [var for var, _ in receives[index] if var not in self.grads]
            outputs: dict[str, tuple[Any, ...]] = {"sends": tuple(sends[index])}
            if index == num_phases - 1:
                outputs = self._outputs(stage)
            phases.append(_slice(equations, outputs, known))
        return StageUpdate(
            params=tuple(i for i, var in enumerate(self.params) if stage in self.homes[var]),
            state=tuple(i for i, var in enumerate(self.state) if stage in self.homes[var]),
            phases=tuple(phases),
            receives=tuple(tuple(group) for group in receives),
        )

    def _outputs(self, stage: int) -> dict[str, tuple[Any, ...]]:
        groups = {
            "params": (self.params, self.new_params),
            "state": (self.state, self.new_state),
        }
        return {
            name: tuple(n for o, n in zip(old, new, strict=True) if stage in self.homes[o])
            for name, (old, new) in groups.items()
        }

    def _describe_mixing(self, param_names: tuple[str, ...]) -> str | None:
        names = dict(zip((*self.grads, *self.params), param_names * 2, strict=True))
        for var, (source, targets) in self.sent.items():
            equations = [self.program.equations[i] for i in self._needed([var])]
            behind = set(jaxprs.free_variables(equations, [var]))
            leaf = next((leaf for leaf in names if leaf in behind), None)
            what = "gradient" if leaf in self.grads else "value"
            name = f" of {names[leaf]!r}" if leaf in names else ""
            return (
                f"the update of the parameters on stage {min(targets)} depends on the "
                f"{what}{name} on stage {source}"
            )
        return None


def _slice(
    equations: Sequence[Equation], outputs: dict[str, tuple[Any, ...]], known: Sequence[Var]
) -> Program:
    wanted = [atom for group in outputs.values() for atom in group]
    kept = jaxprs.needed(equations, wanted, known)
    return Program(tuple(equations[i] for i in kept), outputs)
