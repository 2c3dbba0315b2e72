"""The answers of the original planner as parts of one line of layers.

The original does not cut a line of nodes but the whole graph: its *states* are sets of nodes that
are closed under their predecessors (down-sets), in an order of its own, and a stage is
the difference of two such sets. An answer names a stage by two numbers of states, which
mean nothing outside that program, and by its compute time, which does:

    answer   states 0–15, 508.686 ms    states 15–40, 163.849 ms
    sums     508.686 ms                 672.535 ms
    nodes    the down-set of 508.686 ms  all

So each end of a stage is matched by the sum of compute times up to it. Several down-sets may
have that sum (nodes without time, branches of equal time); of all ways to choose one for every
end such that each lies in the next, the one that sends the fewest bytes is taken, to the favour of
the original. If there is none, the answer is no division of the model at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from pdjax.plan.cost_model import Part
from pdjax.profile.graph_txt import read_graph
from pdjax.profile.profile import Profile

_SAME_S = 1e-7  # the files give microseconds

Nodes = frozenset[int]
"""Some nodes of a graph, by their place on our line."""


@dataclass(frozen=True)
class Graph:
    """A graph of the original: our line of its nodes, and who reads whom.

    Attributes:
        profile: the nodes as layers, in our order; the stash of each is its activation.
        sources: for each node the nodes that it reads.
        down_sets: all sets of nodes with everything that is before them.
    """

    profile: Profile
    sources: tuple[Nodes, ...]
    down_sets: tuple[Nodes, ...]

    def compute_s(self, nodes: Iterable[int]) -> float:
        return math.fsum(self.profile.layers[node].compute_s for node in nodes)

    def cut_bytes(self, before: Nodes) -> float:
        """What crosses the cut behind a down-set: every node in it with a reader outside, once."""
        read = {
            source
            for node, found in enumerate(self.sources)
            for source in found
            if node not in before and source in before
        }
        return math.fsum(self.profile.layers[node].stash_bytes for node in read)

    def in_order(self, order: Sequence[int]) -> Profile:
        """The profile with its nodes in another order."""
        layers, before = [], set()
        for node in order:
            before.add(node)
            width = self.cut_bytes(frozenset(before))
            layers.append(replace(self.profile.layers[node], cut_bytes=width))
        return replace(self.profile, layers=tuple(layers))


def load_graph(text: str, where: str) -> Graph:
    """Reads a ``graph.txt``. As in the original, inputs cost nothing and are not sent."""
    profile = read_graph(text, where)
    layers = tuple(
        replace(layer, forward_s=0.0, stash_bytes=0.0) if _is_input(layer.name) else layer
        for layer in profile.layers
    )
    profile = replace(profile, layers=layers)
    place = {name.partition(" ")[0]: at for at, name in enumerate(profile.names)}
    sources: list[set[int]] = [set() for _ in place]
    for line in text.splitlines():
        if line.startswith("\t"):
            source, target = (place[name.strip()] for name in line.split(" -- "))
            sources[target].add(source)
    frozen = tuple(map(frozenset, sources))
    graph = Graph(profile, frozen, tuple(_down_sets(profile.names, frozen)))
    return replace(graph, profile=graph.in_order(range(len(layers))))


def _is_input(name: str) -> bool:
    return name.partition(" ")[2].startswith("Input")


def _down_sets(names: Sequence[str], sources: Sequence[Nodes]) -> list[Nodes]:
    """All down-sets, except that nodes without any weight are not counted by themselves.

    As in the original, inputs are in all of them, and dead ends (unread parts of a tuple)
    come right after their sources.
    """
    read = frozenset().union(*sources)
    start = {at for at, name in enumerate(names) if _is_input(name)}
    dead = {at for at, name in enumerate(names) if "__getitem__" in name and at not in read}
    inner = [at for at in range(len(names)) if at not in start | dead]

    def closed(nodes: Nodes) -> Nodes:
        return nodes | {at for at in dead if sources[at] <= nodes}

    first = closed(frozenset(start))
    found, waiting = {first}, [first]
    while waiting:
        now = waiting.pop()
        for node in inner:
            if node not in now and sources[node] <= now:
                more = closed(now | {node})
                if more not in found:
                    found.add(more)
                    waiting.append(more)
    return list(found)


@dataclass(frozen=True)
class Answer:
    """An answer of the original.

    Attributes:
        profile: the nodes in an order in which each of its stages is a run of layers; None if
            there is no such order, because its stages are no division of the model.
        parts: the plan on that line.
        ends: for each stage the compute seconds of all nodes up to its end.
    """

    profile: Profile | None
    parts: tuple[Part, ...]
    ends: tuple[float, ...]


def read_answer(graph: Graph, answer: dict[str, Any]) -> Answer:
    """Finds the runs of layers that an answer speaks of."""
    levels = [level["groups"] for level in answer["levels_outer_first"]]
    leaves = [stage for group in levels[-1] for stage in group]
    ends, total = [], 0.0
    for stage in leaves:
        total += stage["compute_time_s"]
        ends.append(total)
    chain = _nested_chain(graph, ends)
    if chain is None:
        return Answer(None, (), tuple(ends))
    order: list[int] = []
    for before, after in pairwise([frozenset(), *chain]):
        order += sorted(after - before)
    bounds = [0, *map(len, chain)]
    runs = {}
    for stage, run in zip(leaves, pairwise(bounds), strict=True):
        runs[tuple(stage["states"])] = run
    return Answer(graph.in_order(order), _parts(levels, runs), tuple(ends))


def _nested_chain(graph: Graph, ends: Sequence[float]) -> list[Nodes] | None:
    """Down-sets with these compute times, each within the next, that send the fewest bytes."""
    sums = {nodes: graph.compute_s(nodes) for nodes in graph.down_sets}
    best: dict[Nodes, tuple[float, list[Nodes]]] = {frozenset(): (0.0, [])}
    for end in ends:
        step: dict[Nodes, tuple[float, list[Nodes]]] = {}
        for nodes in (n for n, seconds in sums.items() if abs(seconds - end) < _SAME_S):
            before = [found for last, found in best.items() if last < nodes]
            if before:
                sent, chain = min(before, key=lambda found: found[0])
                step[nodes] = sent + graph.cut_bytes(nodes), [*chain, nodes]
        best = step
    everything = frozenset(range(len(graph.profile.layers)))
    return best[everything][1] if everything in best else None


def _parts(levels: Sequence[Any], runs: dict[tuple[int, ...], tuple[int, int]]) -> tuple[Part, ...]:
    """The answer's groups as nested parts, from the first unit of each level on."""
    if len(levels) == 1:
        return _units([(runs[tuple(s["states"])], s["replication"], ()) for s in levels[0][0]])
    outer = []
    for stage, group in zip(levels[0][0], levels[1], strict=True):
        inner = _parts([[group]], runs)
        outer.append(((inner[0].first, inner[-1].stop), stage["replication"], inner))
    return _units(outer)


def _units(stages: Sequence[tuple[tuple[int, int], int, tuple[Part, ...]]]) -> tuple[Part, ...]:
    parts, unit = [], 0
    for (first, stop), replicas, inner in stages:
        parts.append(Part(first, stop, replicas, unit, inner))
        unit += replicas
    return tuple(parts)
