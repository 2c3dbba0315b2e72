"""The quickstart programs run, are short, and learn."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

QUICKSTART = pathlib.Path(__file__).parent.parent / "experiments" / "quickstart"


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
