"""Of plans that are equally fast, one that sends less.

The time of a plan is that of its slowest part, and the others have room: cuts can be moved, without
a change of the time, to where fewer bytes cross. Nothing here imports JAX.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pdjax.plan.cost_model import Costs, Part, PlacedStage


def refine_cuts(costs: Costs, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The plan with the cuts of each innermost pipeline where they send the fewest bytes.

    No stage takes longer than the slowest part of its pipeline did, and memory suffices where it
    did. Replicas stay as they are.
    """
    stages = {stage.first: stage for stage in costs.stages(parts)}

    def walk(parts: tuple[Part, ...], level: int, outer: int) -> tuple[Part, ...]:
        if level:
            return tuple(
                replace(part, inner=walk(part.inner, level - 1, outer * part.replicas))
                for part in parts
            )
        if len(parts) == 1:
            return parts
        mine = [stages[part.first] for part in parts]
        return _Pipeline(costs, parts, mine, outer).refine_cuts()

    return walk(parts, len(costs.topology.levels) - 1, 1)


class _Pipeline:
    """Stages in a row on the units of the innermost level."""

    def __init__(
        self, costs: Costs, parts: tuple[Part, ...], stages: list[PlacedStage], outer: int
    ) -> None:
        self.costs, self.parts, self.stages, self.outer = costs, parts, stages, outer
        self.limit_s = costs.plan_s(parts, 0, outer) * (1 + 1e-12)
        bandwidth = costs.topology.levels[0].bandwidth_bytes_per_s
        widest = self.limit_s * bandwidth / 2 if costs.cost.activations else np.finfo(float).max
        self.allowed = costs.width_bytes <= widest

    def refine_cuts(self) -> tuple[Part, ...]:
        """The cuts by dynamic programming, stage by stage from the first one."""
        begin, end = self.parts[0].first, self.parts[-1].stop
        cuts = [np.array([begin]), *self._windows(), np.array([end])]
        sent, choices = np.zeros(1), []
        for number in range(len(self.parts)):
            first, stop = cuts[number][:, None], cuts[number + 1][None, :]
            possible = self._possible(number, first, stop)
            table = np.where(possible, sent[:, None], np.inf)
            choices.append(table.argmin(axis=0))
            sent = table.min(axis=0) + self.costs.width_bytes[cuts[number + 1]]
        if not np.isfinite(sent[0]):
            return self.parts
        at, bounds = 0, [end]
        for number in range(len(self.parts) - 1, -1, -1):
            at = int(choices[number][at])
            bounds.append(int(cuts[number][at]))
        bounds.reverse()
        return tuple(
            replace(part, first=first, stop=stop)
            for part, first, stop in zip(self.parts, bounds[:-1], bounds[1:], strict=True)
        )

    def _windows(self) -> list[np.ndarray]:
        """For each cut the layers before which it may fall: as far as time allows."""
        lowest, highest = [], []
        at = self.parts[-1].stop
        for number in range(len(self.parts) - 1, 0, -1):
            at = self._farthest(number, at, -1)
            lowest.append(at)
        lowest.reverse()
        at = self.parts[0].first
        for number in range(len(self.parts) - 1):
            at = self._farthest(number, at, +1)
            highest.append(at)
        return [
            np.flatnonzero(self.allowed[low : high + 1]) + low
            for low, high in zip(lowest, highest, strict=True)
        ]

    def _farthest(self, number: int, at: int, direction: int) -> int:
        """How far a stage may reach in time from a cut."""
        begin, end = self.parts[0].first, self.parts[-1].stop
        others = np.arange(begin, at) if direction < 0 else np.arange(at + 1, end + 1)
        if not len(others):
            return at
        first, stop = (others, np.array(at)) if direction < 0 else (np.array(at), others)
        quick = others[self._quick(number, first, stop)]
        if not len(quick):
            return at
        return int(quick.min() if direction < 0 else quick.max())

    def _quick(self, number: int, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        part = self.parts[number]
        return (
            self.costs.stage_s(first, stop, part.replicas, self.outer, part.remat) <= self.limit_s
        )

    def _possible(self, number: int, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        stage, costs = self.stages[number], self.costs
        needed = costs.bytes_of(first, stop, stage.warm_up, stage.remat)
        fits = needed <= costs.limit_bytes(stage.workers)
        return (first < stop) & self._quick(number, first, stop) & fits
