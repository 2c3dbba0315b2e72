"""The public surface: small and documented."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import pdjax
import pdjax.data
import pdjax.models

PUBLIC = [name for name in dir(pdjax) if not name.startswith("_")]
SOURCES = sorted(Path(pdjax.__path__[0]).rglob("*.py"))


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


def test_every_module_has_a_docstring():
    without = [str(p) for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text()))]
    assert not without
