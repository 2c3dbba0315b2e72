"""python -m pdjax.train, from its flags to its files."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pdjax import data, distributed
from pdjax.data import SOURCES
from pdjax.models import MODELS
from pdjax.schedules import ALGORITHMS
from pdjax.task import make_task
from pdjax.train.__main__ import main, train
from pdjax.train.config import TrainConfig
from pdjax.train.data_check import check_same_task

SMALL = {
    "transformer": ("width=8", "num_blocks=2", "num_heads=2", "dropout=0.0"),
    "mlp": ("width=8", "num_blocks=2"),
    "vgg16": ("width_multiplier=0.03", "dense_width=8", "dropout=0.0"),
    "vgg16_bn": ("width_multiplier=0.03", "dense_width=8", "dropout=0.0"),
}
pytestmark = pytest.mark.usefixtures("compiled_quickly")
TEXT = "the quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return path


def run(tmp_path, model, **options):
    output = tmp_path / "run"
    config = TrainConfig(
        **{
            "model": model,
            "model_fields": SMALL[model],
            "steps": 18,
            "batch_size": 8,
            "eval_examples": 16,
            "sequence_length": 16,
            "output": output,
            **options,
        }
    )
    text = io.StringIO()
    summary = train(config, Console(file=text, width=200))
    return output, summary, text.getvalue()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("transformer", {"schedule": "pipedream", "num_stages": 3}),
        ("mlp", {"data": "synthetic-images", "schedule": "gpipe", "num_microbatches": 2}),
        ("vgg16_bn", {"data": "digits", "num_microbatches": 2, "remat": "full"}),
    ],
)
def test_a_run_writes_its_files(tmp_path, text_file, model, options):
    options = {"data": str(text_file), **options}
    output, summary, text = run(tmp_path, model, **options)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(18))
    assert all(line["loss"] > 0 and 0 <= line["accuracy"] <= 1 for line in lines)
    assert json.loads((output / "summary.json").read_text()) == summary
    assert summary["initial_loss"] == lines[0]["loss"]
    assert summary["steps"] == 18
    assert summary["schedule"] == options.get("schedule", "one_f_one_b")
    assert len(summary["stages"]) == options.get("num_stages", 2)
    for name in ("final_loss", "eval_loss", "examples_per_s", "single_device_examples_per_s"):
        assert summary[name] > 0
    assert (output / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert "step 18/18" in text, "progress can be read where there is no terminal"
    assert "held out" in text


def test_it_learns(tmp_path, text_file):
    _, summary, _ = run(
        tmp_path,
        "transformer",
        data=str(text_file),
        steps=80,
        learning_rate=2e-2,
        single_device=False,
    )
    assert summary["final_loss"] < 0.7 * summary["initial_loss"]
    assert summary["eval_loss"] < 0.8 * summary["initial_loss"]
    assert summary["single_device_examples_per_s"] is None


def test_the_same_seed_gives_the_same_run(tmp_path, text_file):
    def losses(name):
        options = {"data": str(text_file), "output": tmp_path / name, "single_device": False}
        output, _, _ = run(tmp_path, "transformer", **options)
        lines = (output.parent / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    assert losses("one") == losses("two")


def other_peers(*others):
    """Processes of which the first is this one, and the others have something else in places."""

    def exchange(about, mine):
        return [mine, *({**mine, **other} for other in others)]

    peers: Any = SimpleNamespace(exchange=exchange, hosts=("here", "there"))
    return peers


def test_processes_that_read_other_data_are_told(tmp_path, text_file):
    """One letter of as long a text, which no shape shows."""
    other_file = tmp_path / "dog.txt"
    other_file.write_text(TEXT[:1000] + "X" + TEXT[1001:])
    sizes: Any = {"sequence_length": 16, "model_fields": SMALL["transformer"]}
    configs = [TrainConfig(data=str(path), **sizes) for path in (text_file, other_file)]
    task, other = (
        make_task("transformer", config.data, initial="shapes", **sizes) for config in configs
    )
    assert task.dataset.description == other.dataset.description
    same = {"the data": f"digest {task.dataset.digest()}"}
    check_same_task(other_peers(same), configs[0], task)
    for differing, name in (
        ({"the data": f"digest {other.dataset.digest()}"}, "the data"),
        ({"--steps": "7"}, "--steps"),
    ):
        text = rf"disagree about {name}: process 0 on here has .+, process 1 on there has .+ same v"
        with pytest.raises(ValueError, match=text):
            check_same_task(other_peers(differing), configs[0], task)


@pytest.mark.parametrize("source", SOURCES)
def test_data_has_a_digest(source):
    one, again, other = (data.load(source, seed=seed).digest() for seed in (0, 0, 1))
    assert one == again != other


@pytest.mark.parametrize(
    ("plan", "schedule", "replicate", "several", "expected"),
    [
        ("auto", "one_f_one_b", None, False, 2),
        ("auto", "one_f_one_b", None, True, None),
        ("auto", "pipedream", None, True, None),
        ("auto", "gpipe", None, True, 2),
        ("auto", "interleaved", None, True, 4),
        ("auto", "one_f_one_b", False, True, 2),
        ("auto", "one_f_one_b", True, False, None),
        ("balanced", "one_f_one_b", None, True, 2),
        ("balanced", "one_f_one_b", True, True, 2),
        (("block_1",), "one_f_one_b", None, True, None),
    ],
)
def test_stages_that_are_asked_for(monkeypatch, plan, schedule, replicate, several, expected):
    """None where they are the planner's to choose, so that it may replicate them."""

    def make_pipeline(config, task, optimizer, schedule, plan, num_stages):
        raise StopIteration(config.replicate, num_stages, task.params)

    peers = other_peers({})
    peers.num_processes = 2
    monkeypatch.setattr(distributed, "current", lambda: peers if several else None)
    monkeypatch.setattr("pdjax.train.__main__._make_pipeline", make_pipeline)
    named: Any = {"cuts": plan} if isinstance(plan, tuple) else {"plan": plan}
    named |= {"model": "mlp", "model_fields": SMALL["mlp"], "schedule": schedule}
    config = TrainConfig(replicate=replicate, **named)
    with pytest.raises(StopIteration) as stopped:
        train(config, Console(file=io.StringIO()))
    given, num_stages, params = stopped.value.args
    assert (given, num_stages) == (replicate, expected)
    assert callable(params) == several


def test_several_processes_train_as_one_does(tmp_path, text_file):
    """Each makes only what its stage trains."""
    arguments = ["--data", str(text_file), "--cuts", "block_1", "--steps", "3", "--batch-size", "8"]
    arguments += ["--model-fields", *SMALL["transformer"], "--sequence-length", "16"]
    arguments += ["--eval-examples", "8", "--num-microbatches", "2", "--no-single-device"]
    launch = ["-m", "pdjax.launch", "--num-processes", "2", "--no-pin", "--", sys.executable]
    found = []
    for name, launcher in (("one", []), ("two", launch)):
        output = tmp_path / name
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "pdjax.train", *arguments, "--output", str(output)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        summary = json.loads((output / "summary.json").read_text())
        found.append({key: summary[key] for key in ("initial_loss", "final_loss", "eval_loss")})
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_bad_input_on_one_host_is_heard_of_on_the_other(tmp_path, text_file):
    """With the exit code, though it is not an exception."""
    script = "import os, sys; file = sys.argv[1 + int(os.environ['PDJAX_PROCESS_ID'])]; "
    script += "os.execv(sys.executable, [sys.executable, '-m', 'pdjax.train', '--data', file])"
    files = [str(text_file), str(tmp_path / "missing.txt")]
    options = ["--num-processes", "2", "--no-pin", "--grace-s", "20", "--"]
    done = subprocess.run(
        [sys.executable, "-m", "pdjax.launch", *options, sys.executable, "-c", script, *files],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stdout + done.stderr
    assert re.search(r"^\[1\] .*missing\.txt", said, re.M), said
    assert re.search(r"^\[0\] error: process 1 .*failed: ended with exit code 2", said, re.M), said


def test_cuts_by_hand(tmp_path, text_file):
    _, summary, _ = run(tmp_path, "transformer", data=str(text_file), cuts=("block_1",), steps=1)
    assert summary["stages"][1][0] == "block_1/norm_attention"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "transformr"], "did you mean 'transformer'"),
        (["--schedule", "gpip"], "Did you mean 'gpipe'"),
        (["--data", "no/such/*.txt"], "no/such"),
        (["--data", "digits"], "takes text, but 'digits' is image"),
        (["--model-fields", "wdth=3"], "did you mean 'width'"),
        (["--model-fields", "width"], "expected NAME=VALUE"),
        (["--num-stages", "9"], "9 stages need"),
        (["--batch-size", "9", "--num-microbatches", "2"], "does not divide"),
        (["--batch-size", "100000"], "100000"),
        (["--steps", "0"], "--steps 0: expected at least 1"),
        (["--learning-rate", "0"], "--learning-rate 0.0: expected more than 0"),
        (["--cuts", "block_7"], "no layer or module 'block_7'"),
    ],
)
def test_bad_input_is_said_and_nothing_written(
    tmp_path, text_file, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    base = ["--data", str(text_file)] if "--data" not in arguments else []
    assert main([*base, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_output_directory_that_holds_another_run(tmp_path, text_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text("{}")
    assert main(["--data", str(text_file), "--output", str(tmp_path / "old")]) == 2
    assert "holds another run (summary.json)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["summary.json"]


def test_an_unreadable_data_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    (tmp_path / "empty.txt").write_text("")
    assert main(["--data", str(tmp_path / "empty.txt")]) == 2
    assert "empty.txt" in capsys.readouterr().err


def test_a_run_that_diverges_stops_and_keeps_what_it_had(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    output = tmp_path / "run"
    arguments = ["--model", "mlp", "--learning-rate", "1e30", "--steps", "30"]
    arguments += ["--output", str(output), "--no-single-device"]
    assert main(arguments) == 1
    assert "training stopped: the loss of step" in capsys.readouterr().err
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert 0 < len(lines) < 30
    assert not (output / "summary.json").exists()


def test_the_module_runs_and_makes_its_own_devices(tmp_path, text_file):
    """In a process of its own, with nothing set beforehand."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    arguments = ["--data", str(text_file), "--num-stages", "3", "--steps", "2"]
    arguments += ["--output", str(tmp_path / "run"), "--batch-size", "6", "--no-single-device"]
    arguments += ["--model-fields", "width=8", "num_blocks=1", "dropout=0.0"]
    done = subprocess.run(
        [sys.executable, "-m", "pdjax.train", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]) == 3


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    for name in (*ALGORITHMS, *MODELS, *SOURCES):
        assert name in text
