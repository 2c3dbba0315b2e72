"""The public surface: small, documented, and its examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import pdjax
import pdjax.data
import pdjax.models

PUBLIC = [name for name in dir(pdjax) if not name.startswith("_")]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(pdjax.__path__, "pdjax.")
    if not module.name.endswith("__main__")
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
