"""Where mutable state is kept.

What makes a new state (a moving average, a counter, a teacher's weights) often does not matter to
the loss, and stands wherever the author wrote it, mostly at the end. These *bookkeeping* equations
may run on any stage that has what they read. They are moved to the stage that reads the old value
for the loss; if none does, to the first one that has all they need. So each leaf of the state is on
one stage, and changes there once per microbatch, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from pdjax.trace import jaxprs
from pdjax.trace.jaxprs import Atom, Var
from pdjax.trace.layers import LayerGraph
from pdjax.trace.loss_fn import TracedLoss


def place_state(traced: TracedLoss, stage_of: dict[int, int]) -> None:
    """Moves the equations that only update the state; changes `stage_of` (by position) in place.

    Raises:
        ValueError: if a state is needed for the loss on one stage, and what its new value is made
            of on a later one only.
    """
    placer = _Placer(traced, stage_of)
    placer.move_back()
    placer.gather()


def inseparable_by_state(graph: LayerGraph) -> list[tuple[int, int]]:
    """Ranges of layers (first, last) that share a changing state, which a cut must not separate.

    Such a range begins with the first layer that reads a leaf of the state for the loss, and ends
    with the last one that does or that makes what its new value is made of.
    """
    traced = graph.traced
    layer_of = _layers(graph)
    placer = _Placer(traced, dict(layer_of))
    placer.move_back()
    ranges = []
    for index, (old, new) in enumerate(zip(traced.state, traced.new_state, strict=True)):
        if new is old:
            continue
        maker = _maker(traced, new)
        positions = [*traced.readers.get(old, ()), maker]
        touching = [layer_of[at] for at in positions if at in placer.on_path and at in layer_of]
        updating = [*placer.together(index), maker]
        if touching:
            layers = [placer.stage_of[at] for at in updating if at in placer.stage_of]
            ranges.append((min(touching), max([*touching, *layers])))
    return ranges


def inseparable_by_ties(graph: LayerGraph) -> list[tuple[int, int]]:
    """Ranges of layers (first, last) that use the same parameter for the loss."""
    traced = graph.traced
    on_path = _on_loss_path(traced)
    users: dict[Var, list[int]] = {}
    for position, layer in _layers(graph).items():
        if position in on_path:
            for param in traced.wide_params(traced.equations[position].invars):
                users.setdefault(param, []).append(layer)
    return [(min(layers), max(layers)) for layers in users.values()]


def _layers(graph: LayerGraph) -> dict[int, int]:
    """For each equation of the line, by its position in the program, its layer."""
    return {
        graph.line[at]: number
        for number, layer in enumerate(graph.layers)
        for at in range(layer.start, layer.stop)
    }


def _maker(traced: TracedLoss, atom: Atom) -> int:
    """The position of the equation that makes a value; -1 if none does."""
    return traced.maker.get(atom, -1) if isinstance(atom, Var) else -1


def _on_loss_path(traced: TracedLoss) -> set[int]:
    """Positions of the equations that the loss and the metrics depend on."""
    weight = [] if traced.weight is None else [traced.weight]
    return set(jaxprs.needed(traced.equations, [traced.loss, *weight, *traced.metrics]))


class _Placer:
    def __init__(self, traced: TracedLoss, stage_of: dict[int, int]) -> None:
        self.traced = traced
        self.stage_of = stage_of
        self.on_path = _on_loss_path(traced)
        changing = [
            new
            for old, new in zip(traced.state, traced.new_state, strict=True)
            if new is not old and isinstance(new, Var)
        ]
        self.movable = {
            position
            for position in jaxprs.needed(traced.equations, changing)
            if position in stage_of
            and position not in self.on_path
            and not jaxprs.has_effects(traced.equations[position])
        }

    def inputs(self, position: int) -> list[Var]:
        return jaxprs.variables(self.traced.equations[position].invars)

    def move_back(self) -> None:
        """Moves every equation to the first stage that has the values of the line it reads."""
        for position in sorted(self.movable):
            self.stage_of[position] = self._first_stage(position)

    def _first_stage(self, position: int) -> int:
        makers = (self.traced.maker.get(var, -1) for var in self.inputs(position))
        return max((self.stage_of[maker] for maker in makers if maker in self.stage_of), default=0)

    def gather(self) -> None:
        """Moves what updates a leaf of the state to one stage, until nothing moves any more."""
        moved = True
        while moved:
            moved = False
            for index in range(len(self.traced.state)):
                together = self.together(index)
                stage = self._home(index, together)
                for position in together:
                    moved |= self.stage_of[position] < stage
                    self.stage_of[position] = max(self.stage_of[position], stage)
            for position in sorted(self.movable):
                first = self._first_stage(position)
                moved |= self.stage_of[position] < first
                self.stage_of[position] = max(self.stage_of[position], first)

    def together(self, index: int) -> list[int]:
        """The bookkeeping that depends on a leaf of the state, or makes its new value."""
        found = {_maker(self.traced, self.traced.new_state[index])} & self.movable
        pending = [self.traced.state[index]]
        while pending:
            readers = self.traced.readers.get(pending.pop(), ())
            for position in self.movable.intersection(readers) - found:
                found.add(position)
                pending += self.traced.equations[position].outvars
        return sorted(found)

    def _home(self, index: int, together: Sequence[int]) -> int:
        """The stage for a leaf of the state: that of those who read it for the loss."""
        old, new = self.traced.state[index], self.traced.new_state[index]
        readers = set(self.traced.readers.get(old, ())) - self.movable
        fixed = {self.stage_of[position] for position in readers if position in self.stage_of}
        writer = _maker(self.traced, new)
        needs = [
            self.stage_of[position] for position in (*together, writer) if position in self.stage_of
        ]
        if not fixed:
            return max([*needs, *map(self._user_of_params, together)], default=0)
        if needs and max(needs) > min(fixed):
            raise ValueError(state_conflict(self.traced, index, min(fixed), max(needs)))
        return max(fixed)

    def _user_of_params(self, position: int) -> int:
        """The last stage that computes the loss with a parameter that an equation reads."""
        params = self.traced.wide_params(self.traced.equations[position].invars)
        return max((self._users.get(param, 0) for param in params), default=0)

    @cached_property
    def _users(self) -> dict[Var, int]:
        users: dict[Var, int] = {}
        for position, stage in self.stage_of.items():
            if position in self.on_path:
                for param in self.traced.wide_params(self.traced.equations[position].invars):
                    users[param] = max(stage, users.get(param, 0))
        return users


def state_conflict(traced: TracedLoss, index: int, reader: int, writer: int | None) -> str:
    """The text of the error for a leaf of the state that two stages would have to share."""
    return (
        f"model_state {traced.state_names[index]!r} is read on stage {reader} and "
        f"updated on stage {writer}, so a microbatch could not start before the one before it "
        "has left the pipeline. Choose cuts that keep both in one stage."
    )
