"""The quickstart programs run, are short, and learn; the guide to schedules says what is so."""

from __future__ import annotations

import doctest
import pathlib
import re
import subprocess
import sys

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
QUICKSTART = EXPERIMENTS / "quickstart"
GUIDE = EXPERIMENTS / "schedules" / "guide.md"


@pytest.mark.parametrize("name", ["linen.py", "nnx.py"])
def test_quickstart(name):
    path = QUICKSTART / name
    assert len(path.read_text().splitlines()) < 40
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"test accuracy ([\d.]+)%", done.stdout)
    assert accuracy
    assert float(accuracy[1]) > 90


def test_the_tables_of_the_guide_are_those_that_are_simulated():
    done = subprocess.run(
        [sys.executable, str(GUIDE.parent / "tables.py")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) > 40
    assert set(rows) <= set(GUIDE.read_text().splitlines())


def test_the_examples_of_the_guide():
    blocks = re.findall(r"^```python\n(>>> .*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "guide.md", None, 0)
    assert doctest.DocTestRunner().run(examples).failed == 0
