"""The public surface: small, documented, and its examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import pdjax
import pdjax.data
import pdjax.models

PUBLIC = [name for name in vars(pdjax) if not name.startswith("_")]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(pdjax.__path__, "pdjax.")
    if not module.name.endswith("__main__")
]
WITHOUT_JAX = [
    "pdjax.plan",
    "pdjax.plan.search",
    "pdjax.plan.planner",
    "pdjax.profile.profile",
    "pdjax.serialization",
    "pdjax.profile.files",
    "pdjax.profile.rates",
    "pdjax.profile.graph_txt",
    "pdjax.topology.topology",
    "pdjax.schedules",
    "pdjax.schedules.validate",
    "pdjax.timeline.timeline",
    "pdjax.timeline.figure",
    "pdjax.timeline.text",
    "pdjax.timeline.memory_figure",
    "pdjax.timeline.perfetto",
    "pdjax.timeline.rows",
    "pdjax.simulate",
    "pdjax.simulate.simulation",
    "pdjax.schedules.weight_rule",
    "pdjax.plan.figure",
    "pdjax.train.config",
    "pdjax.distributed",
    "pdjax.distributed.connections",
    "pdjax.distributed.rendezvous",
    "pdjax.launch",
]


def exported():
    return [
        name for name in PUBLIC if not inspect.ismodule(getattr(pdjax, name)) or name in ("nnx",)
    ]


def test_about_twenty_names():
    assert len(exported()) <= 25


@pytest.mark.parametrize("name", exported())
def test_every_public_name_is_documented(name):
    value = getattr(pdjax, name)
    if name in ("LATEST", "STASH", "ALGORITHMS"):  # values: the text stands below them
        return
    assert inspect.getdoc(value)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    assert module.__doc__
    failures, _ = doctest.testmod(module)
    assert failures == 0


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_planning_needs_no_jax(name):
    """These modules may be used where JAX is not installed."""
    program = f"""
import sys, types, importlib.util, pathlib
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "flax", "optax"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
root = types.ModuleType("pdjax")
root.__path__ = {list(pdjax.__path__)!r}
sys.modules["pdjax"] = root
importlib.import_module({name!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
