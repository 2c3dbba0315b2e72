"""The stage on which each leaf of the mutable state is kept.

The equations that make a new state (a moving average, a counter, a teacher's weights) often do not
matter to the loss, and stand wherever the author wrote them, mostly at the end. Such *state
updates* may run on any stage that has their inputs. They move to the stage that reads the old value
for the loss; if none does, to the first one that has all their inputs. So each leaf of the state
is on one stage, and changes there once per microbatch, in order.
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
        ValueError: if a state is needed for the loss on one stage, and the inputs of its new value
            are on a later one only.
    """
    placer = _StatePlacer(traced, stage_of)
    placer.move_to_earliest()
    placer.join_leaves()


def inseparable_by_state(graph: LayerGraph) -> list[tuple[int, int]]:
    """Ranges of layers (first, last) that share a changing state, which a cut must not separate.

    Such a range begins with the first layer that reads a leaf of the state for the loss, and ends
    with the last one that reads it or that makes an input of its new value.
    """
    traced = graph.traced
    layer_of = _layers(graph)
    placer = _StatePlacer(traced, dict(layer_of))
    placer.move_to_earliest()
    ranges = []
    for index, (old, new) in enumerate(zip(traced.state, traced.new_state, strict=True)):
        if new is old:
            continue
        maker = _maker(traced, new)
        positions = [*traced.flow.readers.get(old, ()), maker]
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
    return traced.flow.makers.get(atom, -1) if isinstance(atom, Var) else -1


def _on_loss_path(traced: TracedLoss) -> set[int]:
    """Positions of the equations that the loss and the metrics depend on."""
    weight = [] if traced.weight is None else [traced.weight]
    return set(traced.flow.needed([traced.loss, *weight, *traced.metrics]))


class _StatePlacer:
    """Moves the state updates among the stages.

    Three stages, a state s that stage 0 reads for the loss, and two state updates that the author
    wrote behind the loss, so that both begin on stage 2: m = mean(h1), s' = 0.9 s + 0.1 m.

    1. Each update moves to the first stage that has its inputs: m to stage 1, where h1 is made; s'
       too, as it reads m.
    2. The updates of one leaf join, on the stage that reads the leaf for the loss: here that is
       stage 0, before m can be computed, which is an error. If stage 1 reads s, all is well.
    3. An update that reads a value that has moved to a later stage moves there too. Steps 2 and 3
       are repeated until nothing moves. An equation only moves to later stages, so this ends.

    Attributes:
        stage_of: for each equation of the line, by its position, its stage; changed in place.
        on_path: positions of the equations that the loss and the metrics depend on.
        movable: positions of the state updates.
    """

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
            for position in traced.flow.needed(changing)
            if position in stage_of
            and position not in self.on_path
            and not jaxprs.has_effects(traced.equations[position])
        }

    def move_to_earliest(self) -> None:
        """Moves every state update to the first stage that has the values of the line it reads."""
        for position in sorted(self.movable):
            self.stage_of[position] = self._first_stage(position)

    def _first_stage(self, position: int) -> int:
        makers = (self.traced.flow.makers.get(v, -1) for v in self.traced.flow.inputs[position])
        return max((self.stage_of[maker] for maker in makers if maker in self.stage_of), default=0)

    def join_leaves(self) -> None:
        """Moves the updates of each leaf of the state to one stage, until nothing moves."""
        updates = [self.together(index) for index in range(len(self.traced.state))]
        moved = True
        while moved:
            moved = False
            for index, together in enumerate(updates):
                stage = self._home(index, together)
                for position in together:
                    moved |= self._postpone(position, stage)
            for position in sorted(self.movable):
                moved |= self._postpone(position, self._first_stage(position))

    def _postpone(self, position: int, stage: int) -> bool:
        """Moves an equation to `stage` if that is later than its own; returns whether it moved."""
        earlier = self.stage_of[position] < stage
        if earlier:
            self.stage_of[position] = stage
        return earlier

    def together(self, index: int) -> list[int]:
        """The state updates that depend on a leaf of the state, or make its new value."""
        flow, maker = self.traced.flow, _maker(self.traced, self.traced.new_state[index])

        def goes_on(position: int, _: Var) -> bool:
            return position in self.movable and position != maker

        reached = flow.reachable([self.traced.state[index]], goes_on)
        positions = {flow.makers[var] for var in reached if var in flow.makers}
        return sorted(positions | ({maker} & self.movable))

    def _home(self, index: int, together: Sequence[int]) -> int:
        """The stage for a leaf of the state: the one that reads it for the loss, if one does."""
        old, new = self.traced.state[index], self.traced.new_state[index]
        readers = set(self.traced.flow.readers.get(old, ())) - self.movable
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
