"""Imports point one way, and some rooms need no JAX.

A *room* is a folder of `pdjax`, or a module at its top. An import counts wherever it stands: at the
top of a file, inside a function, or for types only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "pdjax"

COMMON = {"errors", "trees", "units", "serialization", "column_table"}
"""Small modules that every room may import."""

LEAVES = {"schedules", "models", "data"}
"""Rooms that import none but the small modules."""

ARROWS: dict[str, set[str]] = {
    "cache": set(),
    "cli": set(),
    "launch": {"cli"},
    **{room: set[str]() for room in LEAVES},
    "timeline": {"schedules"},
    "distributed": set(),
    "trace": set(),
    "nnx": {"trace"},
    "task": {"models", "data"},
    "split": {"trace"},
    "communication": {"trace", "split", "distributed"},
    "profile": {"cache", "trace", "split"},
    "topology": {"cache", "distributed", "communication"},
    "bandwidth": {"cli", "distributed", "topology"},
    "plan": {"schedules", "timeline", "profile", "topology"},
    "simulate": {"schedules", "timeline", "profile", "topology", "plan"},
    "runtime": {"schedules", "timeline", "trace", "split", "distributed", "communication"},
    "pipeline": {
        *("schedules", "timeline", "trace", "split", "distributed", "communication"),
        *("profile", "topology", "plan", "simulate", "runtime"),
    },
    "train": {
        "data",
        "distributed",
        "pipeline",
        "plan",
        "schedules",
        "task",
        "timeline",
        "topology",
    },
}
"""For each room the rooms that it may import, besides the small modules."""

WITHOUT_JAX = {
    *("errors", "units", "serialization", "column_table", "cli", "launch"),
    *("schedules", "timeline", "plan", "simulate"),
}
"""Rooms in which no module imports JAX, directly or through another module."""

VALUES_WITHOUT_JAX = {
    "pdjax",
    "pdjax.profile",
    "pdjax.profile.profile",
    "pdjax.profile.files",
    "pdjax.profile.graph_txt",
    "pdjax.profile.rates",
    "pdjax.topology",
    "pdjax.topology.topology",
    "pdjax.train.config",
    "pdjax.distributed",
    "pdjax.distributed.connections",
    "pdjax.distributed.rendezvous",
}
"""Modules without JAX in rooms that have others with it."""

JAX = {"jax", "jaxlib", "flax", "optax", "chex"}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ("pdjax", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    """The folder or the module at the top; "" for the package and for the doors of commands."""
    parts = module.split(".")
    return "" if len(parts) == 1 or parts[-1] == "__main__" else parts[1]


@cache
def imports(module: str, *, at_top: bool = False) -> tuple[str, ...]:
    """The modules that a module imports; with `at_top` those that its own import brings along."""
    tree = ast.parse(MODULES[module].read_text())
    return tuple(imported(module, top_level(tree) if at_top else ast.walk(tree)))


def imported(module: str, nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                yield longer if longer in MODULES else str(node.module)


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in tree.body:
        is_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not is_types:
            yield node


def reached(module: str) -> set[str]:
    """All modules that an import of `module` loads, packages on the way included."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if name in MODULES:
            parent = name.rpartition(".")[0]
            waiting += [*imports(name, at_top=True), *([parent] if parent else [])]
    return found


ROOMS = sorted({room_of(module) for module in MODULES} - {""})


def test_every_room_has_its_row():
    assert set(ROOMS) - COMMON == set(ARROWS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_arrows(room):
    allowed = COMMON | ARROWS.get(room, set()) | {room, ""}
    if room in COMMON:
        allowed = {room}
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if room_of(module) == room
        for name in imports(module)
        if name.split(".")[0] == "pdjax" and room_of(name) not in allowed
    ]
    assert not wrong


def test_only_programs_import_the_whole_package():
    """`import pdjax` inside the package would be a circle; the training command is a user of it."""
    users = {module for module in MODULES if "pdjax" in imports(module)}
    assert {room_of(module) for module in users} <= {"train", ""}


def test_arrows_make_no_circle():
    def below(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, f"a circle: {' → '.join([*path, room])}"
        for other in ARROWS.get(room, ()):
            below(other, (*path, room))

    for room in ARROWS:
        below(room, ())


def test_modules_make_no_circle():
    """Inside the rooms, too."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' → '.join([*path[path.index(module) :], module])}"
        if module in done or module not in MODULES:
            return
        for name in imports(module):
            visit(name, (*path, module))
        done.add(module)

    for module in MODULES:
        if module != "pdjax":
            visit(module, ())


@pytest.mark.parametrize(
    "module",
    sorted(
        VALUES_WITHOUT_JAX
        | {m for m in MODULES if room_of(m) in WITHOUT_JAX and not m.endswith("__main__")}
    ),
)
def test_planning_and_simulating_need_no_jax(module):
    """These modules are of use where JAX is not installed."""
    assert not {name for name in reached(module) if name.split(".")[0] in JAX}
