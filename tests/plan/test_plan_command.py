"""python -m pdjax.plan, and the plans that python -m pdjax.train is given."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pdjax.models import MODELS
from pdjax.plan import Plan
from pdjax.plan.__main__ import PlanConfig, main, plan_model
from pdjax.profile.files import load_profile
from pdjax.train.__main__ import train
from pdjax.train.config import TrainConfig

GRAPH = """\
node1 -- Input -- forward_compute_time=0.0, backward_compute_time=0.0, activation_size=4000.0, \
parameter_size=0.0
node2 -- Conv -- forward_compute_time=4.0, backward_compute_time=8.0, activation_size=8000.0, \
parameter_size=1000.0
node3 -- Linear -- forward_compute_time=2.0, backward_compute_time=4.0, activation_size=400.0, \
parameter_size=9000000.0
\tnode1 -- node2
\tnode2 -- node3
"""
SIZES = {
    "transformer": ("width=8", "num_blocks=2", "num_heads=2", "dropout=0.0"),
    "mlp": ("width=8", "num_blocks=2"),
    "vgg16": ("width_multiplier=0.03", "dense_width=8"),
    "vgg16_bn": ("width_multiplier=0.03", "dense_width=8"),
}


@pytest.fixture
def graph_file(tmp_path):
    path = tmp_path / "graph.txt"
    path.write_text(GRAPH)
    return path


def run(**options):
    text = io.StringIO()
    plan = plan_model(PlanConfig(**options), Console(file=text, width=200, soft_wrap=True))
    return plan, text.getvalue()


def test_from_a_file_to_a_plan_and_a_picture(tmp_path, graph_file):
    picture, output = tmp_path / "new" / "plan.png", tmp_path / "new" / "plan.json"
    plan, text = run(profile=graph_file, topology="3@10MB/s", output=output, picture=picture)
    assert plan.notation == "2-1"
    assert plan.first_layers == (0, 2)
    assert Plan.load(output) == plan
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "3 layers, imported; pipedream on 3@10MB/s" in text
    assert str(plan) in text
    assert f"wrote {output}" in text


def test_the_flags_reach_the_planner(graph_file):
    options = {"profile": graph_file, "topology": "3@1MB/s"}
    assert run(**options, replicate=False)[0].notation == "1-1"
    assert run(**options, replicate=False, num_stages=3)[0].num_stages == 3
    plan, text = run(**options, schedule="gpipe", num_microbatches=4)
    assert plan.prediction is not None
    assert plan.prediction.num_microbatches == 4
    assert "gpipe on" in text
    memory = {"topology": "3@1MB/s:28MB", "profile": graph_file}
    with pytest.raises(ValueError, match="no plan fits"):
        run(**memory)
    run(**memory, optimizer_bytes_per_param_byte=0)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_can_be_estimated(tmp_path, model):
    saved = tmp_path / "profile.json"
    options = {"model": model, "model_fields": SIZES[model], "rates": "v100", "batch_size": 4}
    plan, text = run(**options, topology="4@1GB/s", save_profile=saved, sequence_length=16)
    profile = load_profile(saved)
    assert (profile.source, profile.batch_size) == ("analytic", 4)
    assert plan.model == profile.model != ""
    assert f"{model}: {len(profile.layers)} layers, analytic for v100, 4 examples" in text


def test_a_plan_is_run_by_the_training_command(tmp_path):
    fields = SIZES["mlp"]
    output = tmp_path / "plan.json"
    model = {"model": "mlp", "model_fields": fields}
    run(
        **model,
        rates="cpu",
        batch_size=8,
        topology="3@1GB/s",
        num_stages=3,
        replicate=False,
        output=output,
    )
    text = io.StringIO()
    config = TrainConfig(
        **model,
        plan=str(output),
        schedule="pipedream",
        steps=2,
        batch_size=8,
        eval_examples=8,
        output=tmp_path / "run",
        single_device=False,
    )
    summary = train(config, Console(file=text, width=200))
    assert summary["num_stages"] == 3
    assert str(Plan.load(output)) in text.getvalue()
    other = TrainConfig(model="mlp", plan=str(output), steps=2, output=tmp_path / "other")
    with pytest.raises(ValueError, match="another model"):
        train(other, Console(file=text))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("schedule", "topology", "replicas"),
    [
        ("pipedream", "3@1GB/s", [1, 2]),
        ("one_f_one_b", "3@1GB/s", [3]),  # data parallelism
        ("pipedream", "3@300kB/s", [1]),
    ],
)
def test_a_plan_is_run_with_its_replicas(tmp_path, schedule, topology, replicas):
    model = {"model": "mlp", "model_fields": SIZES["mlp"]}
    plan = tmp_path / "plan.json"
    count = 1 if schedule == "pipedream" else 4
    options = {"schedule": schedule, "num_microbatches": count}
    told = {"rates": "cpu", "batch_size": 8, "topology": topology, "overlap": True}
    run(**model, **options, **told, output=plan)
    config = TrainConfig(
        **model,
        **options,
        plan=str(plan),
        steps=7,
        batch_size=8 * count,
        eval_examples=8,
        output=tmp_path / "run",
        single_device=False,
    )
    summary = train(config, Console(file=io.StringIO(), width=200))
    assert summary["replicas"] == replicas
    assert summary["eval_loss"] > 0


def test_the_training_command_plans_for_a_topology(tmp_path):
    config = TrainConfig(
        model="mlp",
        model_fields=SIZES["mlp"],
        plan="auto",
        topology="2@1GB/s:1GiB",
        schedule="pipedream",
        steps=2,
        batch_size=8,
        eval_examples=8,
        single_device=False,
        output=tmp_path / "run",
    )
    text = io.StringIO()
    train(config, Console(file=text, width=200))
    assert "1.0 GiB" in text.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "4@1GB/s"], "expected one of --profile FILE and --model NAME"),
        (["--topology", "4@1GB/s", "--model", "mlp", "--profile", "x"], "expected one of"),
        (["--topology", "4@1parsec/s", "--model", "mlp"], "'1parsec/s' is not a bandwidth"),
        (["--topology", "4@0GB/s", "--model", "mlp"], "bandwidth of 0.0 bytes/s"),
        (["--topology", "4@1GB/s", "--model", "lstm"], "unknown model 'lstm'"),
        (["--topology", "4@1GB/s", "--model", "mlp", "--rates", "fast"], "fast"),
        (["--topology", "4@1GB/s", "--model", "mlp", "--batch-size", "0"], "expected at least 1"),
        (["--topology", "4@1GB/s", "--profile", "none.txt"], "cannot read the profile none.txt"),
        (["--topology", "4@1GB/s", "--model", "mlp", "--picture", "plan.gif"], ".png or .svg"),
        (["--topology", "4@1GB/s", "--model", "mlp", "--output", "."], "is a directory"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_an_error_without_a_traceback(graph_file, capsys):
    arguments = ["--profile", str(graph_file), "--topology", "2@1GB/s"]
    assert main([*arguments, "--output", str(graph_file / "plan.json")]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_file_with_a_fault_is_named_with_its_line(tmp_path, capsys):
    for text, message in (
        (GRAPH.replace("4.0, backward", "-4.0, backward"), "graph.txt, line 2"),
        (GRAPH.replace("forward_compute_time=2.0, ", ""), "graph.txt, line 3"),
        (GRAPH + "\tnode3 -- node2\n", "cycle"),
        ("", "no nodes"),
        (json.dumps({"format": 1, "layers": []}), "no layers"),
        (json.dumps({"format": 1, "layers": [{"name": "x"}]}), "layer 1: missing forward_s"),
    ):
        path = tmp_path / "graph.txt"
        path.write_text(text)
        assert main(["--profile", str(path), "--topology", "2@1GB/s"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
