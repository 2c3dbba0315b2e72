"""The pages state what the code does: quickstart, README and the guide to schedules are run."""

from __future__ import annotations

import doctest
import pathlib
import re
import shlex
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

import pdjax
from pdjax.plan.__main__ import main as plan_command

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
EXPERIMENTS = ROOT / "experiments"
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


def readme_block(begins_with):
    """The text of the one fenced block of the README that begins so."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(begins_with)]
    return block


def test_the_grid_of_the_readme():
    block = readme_block(">>> print(pdjax.one_f_one_b(num_stages=3, num_microbatches=4))")
    examples = doctest.DocTestParser().get_doctest(block, {"pdjax": pdjax}, "README.md", None, 0)
    assert len(examples.examples) == 1
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_the_plan_of_the_readme(tmp_path, monkeypatch, capsys):
    """The command prints the table that stands below it, and draws a picture."""
    monkeypatch.chdir(tmp_path)
    command, _, expected = readme_block("$ python -m pdjax.plan").partition("\n")
    words = shlex.split(command)
    assert words[:4] == ["$", "python", "-m", "pdjax.plan"]
    assert plan_command(words[4:]) == 0
    printed = capsys.readouterr().out.splitlines()
    written = [line for line in printed if line.startswith("wrote ")]
    assert written == ["wrote plan.png"]
    assert [line for line in printed if line not in written] == expected.splitlines()
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


class Tiny(nn.Module):
    """Enough layers for five stages."""

    @nn.compact
    def __call__(self, x):
        for _ in range(6):
            x = nn.Dropout(0.1, deterministic=False)(nn.relu(nn.Dense(32)(x)))
        return nn.Dense(4)(x)


@pytest.mark.usefixtures("compiled_quickly")
def test_the_training_loop_of_the_readme():
    """As it stands, with a model, its parameters, a batch and a loader of ours."""
    model, rng = Tiny(), np.random.default_rng(0)
    x = 3 * rng.normal(size=(32, 8)).astype(np.float32)
    batch = {"x": x, "y": x[:, :4].argmax(-1)}
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = model.init(keys, x)["params"]
    losses = []

    def loader():
        for _ in range(200):
            yield batch
            losses.append(names["metrics"]["loss"])

    names = {"model": model, "params": params, "batch": batch, "loader": loader()}
    exec(readme_block("import jax, optax, pdjax"), names)
    trained, pipe = names["params"], names["pipe"]
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    assert pipe.plan.num_stages == len(jax.devices()) == 5
    assert pipe.schedule.name == "pipedream"
    assert len(losses) == 200
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10]), "it learns"
