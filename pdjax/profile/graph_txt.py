"""Profiles in the text form of the original PipeDream.

A file has a line for every node and, after a tab, for every edge:

    node3 -- Conv2d(3, 64) -- forward_compute_time=1.5, backward_compute_time=3.0,
        activation_size=4096.0, parameter_size=1728.0
        node3 -- node4

(the first is one line). Times are in milliseconds, sizes in bytes; an activation may be a list,
``[4096.0; 128.0]``. The form is that of the profiler of the original PipeDream; the graph
is any directed graph without cycles. To be cut it is put into a line; the bytes that cross a cut
are those of every node before it with a reader after it, each node counted once. Inputs of the
model (nodes that nothing leads to, described as ``Input…``) cost nothing: what they took is the
loading of data, and a batch goes straight to the stages that read it. The original drops them, too.

Nothing here imports JAX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pdjax.profile.profile import LayerProfile, Profile

_FIELDS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")
_VALUE = re.compile(r"\[[^\]]*\]|[^,]+")


@dataclass(frozen=True)
class Node:
    """A node of the graph.

    Attributes:
        name: its identifier, such as ``"node3"``.
        description: what it is, such as ``"Conv2d(3, 64)"``.
        forward_s: seconds of its forward pass.
        backward_s: seconds of its backward pass.
        activation_bytes: bytes of its output.
        param_bytes: bytes of its parameters.
    """

    name: str
    description: str
    forward_s: float
    backward_s: float
    activation_bytes: float
    param_bytes: float


def read_graph(text: str, where: str = "graph.txt") -> Profile:
    """Reads a profile of the original, and puts its nodes into a line.

    Args:
        text: the text of the file.
        where: its name, for errors.

    Raises:
        ValueError: naming file and line, if a line has another form, a number is negative or no
            number, an edge names an unknown node, or the graph is empty or has a cycle.
    """
    nodes: dict[str, Node] = {}
    edges: list[tuple[str, str, int]] = []
    for number, line in enumerate(text.splitlines(), 1):
        place = f"{where}, line {number}"
        if not line.strip():
            continue
        if line.startswith("\t"):
            edges.append((*_read_edge(line, place), number))
            continue
        node = _read_node(line, place)
        if node.name in nodes:
            raise ValueError(f"{place}: node {node.name!r} is there twice.")
        nodes[node.name] = node
    if not nodes:
        raise ValueError(f"{where}: no nodes; expected lines like 'node1 -- Linear -- …'.")
    for source, target, number in edges:
        for name in (source, target):
            if name not in nodes:
                raise ValueError(f"{where}, line {number}: an edge names {name!r}, no node.")
    readers: dict[str, list[str]] = {name: [] for name in nodes}
    for source, target, _ in edges:
        readers[source].append(target)
    _free_inputs(nodes, {target for _, target, _ in edges})
    order = narrow_order(nodes, readers, where)
    return Profile(_as_layers(order, nodes, readers))


def _free_inputs(nodes: dict[str, Node], targets: set[str]) -> None:
    """Takes the costs off the inputs of the model, in place."""
    for name in nodes.keys() - targets:
        if nodes[name].description.startswith("Input"):
            nodes[name] = replace(nodes[name], forward_s=0, backward_s=0, activation_bytes=0)


def write_graph(profile: Profile) -> str:
    """The profile in the original's form: a chain, each activation that of the cut behind it."""
    lines = []
    for number, layer in enumerate(profile.layers, 1):
        lines.append(
            f"node{number} -- {layer.name} -- forward_compute_time={layer.forward_s * 1e3!r}, "
            f"backward_compute_time={layer.backward_s * 1e3!r}, "
            f"activation_size={float(layer.cut_bytes)!r}, "
            f"parameter_size={float(layer.param_bytes)!r}"
        )
    count = len(profile.layers)
    lines += [f"\tnode{number} -- node{number + 1}" for number in range(1, count)]
    return "\n".join(lines) + "\n"


def _read_edge(line: str, place: str) -> tuple[str, str]:
    parts = [part.strip() for part in line.split(" -- ")]
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"{place}: expected an edge, 'node1 -- node2', after the tab.")
    return parts[0], parts[1]


def _read_node(line: str, place: str) -> Node:
    parts = line.split(" -- ")
    if len(parts) < 3:
        raise ValueError(
            f"{place}: expected 'node -- description -- figures' (edges begin with a tab)."
        )
    figures: dict[str, str] = dict.fromkeys(_FIELDS, "")
    for match in _VALUE.finditer(_protect(parts[-1])):
        key, _, value = match[0].partition("=")
        if key.strip() in figures:
            figures[key.strip()] = value.strip()
    missing = [name for name, value in figures.items() if not value]
    if missing:
        raise ValueError(f"{place}: no {' and no '.join(missing)}.")
    forward, backward, activation, params = (
        _number(figures[name], name, place) for name in _FIELDS
    )
    name, description = parts[0].strip(), " -- ".join(parts[1:-1]).strip()
    return Node(name, description, forward / 1e3, backward / 1e3, activation, params)


def _protect(figures: str) -> str:
    """Commas inside a list would end a figure."""
    return re.sub(r"\[[^\]]*\]", lambda match: match[0].replace(",", ";"), figures)


def _number(text: str, name: str, place: str) -> float:
    """A figure; of a list the sum."""
    parts = text.strip("[]").split(";")
    try:
        values = [float(part) for part in parts if part.strip()]
    except ValueError:
        raise ValueError(f"{place}: {name} is {text!r}; expected a number.") from None
    if not values or not all(0 <= value < float("inf") for value in values):
        raise ValueError(f"{place}: {name} is {text}; expected a number that is not negative.")
    return sum(values)


def narrow_order(
    nodes: Mapping[str, Node], readers: Mapping[str, Sequence[str]], where: str
) -> list[str]:
    """A topological order that keeps few bytes alive: it goes on with what ends most of them.

    Of the nodes whose inputs are all there, the next is the one after which the fewest bytes are
    waiting to be read; among equals the one that became ready last, so that a branch is followed
    to its end.
    """
    waits = dict.fromkeys(nodes, 0)
    sources: dict[str, list[str]] = {name: [] for name in nodes}
    for source, targets in readers.items():
        for target in targets:
            waits[target] += 1
            sources[target].append(source)
    unread = {name: len(targets) for name, targets in readers.items()}
    ready = [name for name in nodes if waits[name] == 0]
    order: list[str] = []
    while ready:

        def growth(name: str) -> float:
            ended = [s for s in set(sources[name]) if unread[s] == sources[name].count(s)]
            freed = sum(nodes[source].activation_bytes for source in ended)
            return (nodes[name].activation_bytes if unread[name] else 0.0) - freed

        at = min(range(len(ready)), key=lambda i: (growth(ready[i]), -i))
        name = ready.pop(at)
        order.append(name)
        for source in sources[name]:
            unread[source] -= 1
        for target in readers[name]:
            waits[target] -= 1
            if waits[target] == 0:
                ready.append(target)
    if len(order) < len(nodes):
        stuck = [name for name in nodes if name not in set(order)]
        raise ValueError(f"{where}: the edges form a cycle among {', '.join(stuck[:8])}.")
    return order


def _as_layers(
    order: Sequence[str], nodes: Mapping[str, Node], readers: Mapping[str, Sequence[str]]
) -> tuple[LayerProfile, ...]:
    position = {name: at for at, name in enumerate(order)}
    layers, alive = [], {}
    for at, name in enumerate(order):
        node = nodes[name]
        alive[name] = max((position[target] for target in readers[name]), default=at)
        alive = {source: last for source, last in alive.items() if last > at}
        layers.append(
            LayerProfile(
                name=f"{name} {node.description}".strip(),
                forward_s=node.forward_s,
                backward_s=node.backward_s,
                cut_bytes=math.fsum(nodes[source].activation_bytes for source in alive),
                param_bytes=node.param_bytes,
                stash_bytes=node.activation_bytes,
            )
        )
    return tuple(layers)
