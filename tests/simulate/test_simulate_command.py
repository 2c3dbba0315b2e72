"""python -m pdjax.simulate."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pdjax.plan import PlanOptions
from pdjax.profile.profile import LayerProfile, Profile
from pdjax.schedules import ALGORITHMS, one_f_one_b
from pdjax.simulate import plan_pipeline
from pdjax.simulate.__main__ import SimulateConfig, main, simulate_plan
from pdjax.topology.topology import Topology


@pytest.fixture
def profile(tmp_path):
    layers = tuple(LayerProfile(f"layer_{at}", 1e-3, 2e-3, 1e3, 1e2, 2e3) for at in range(8))
    path = tmp_path / "profile.json"
    Profile(layers, batch_size=10).save(path)
    return path


@pytest.fixture
def plan(tmp_path, profile):
    path = tmp_path / "plan.json"
    options = PlanOptions(num_stages=4, replicate=False)
    found = plan_pipeline(
        Profile.from_json(profile.read_text()), Topology.parse("4@1GB/s"), options
    )
    found.save(path)
    return path


def run(**options):
    text = io.StringIO()
    console = Console(file=text, width=200, soft_wrap=True, highlight=False)
    return simulate_plan(SimulateConfig(**options), console), text.getvalue()


def test_all_schedules_are_compared(plan, profile):
    comparison, text = run(plan=plan, profile=profile, num_microbatches=8)
    assert [outcome.name for outcome in comparison.outcomes] == list(ALGORITHMS)
    assert text == f"{comparison}\n"
    assert "cut into 8 stages" in text
    assert "taken as 8 equal stages" in run(plan=plan)[1]


def test_one_schedule_is_drawn(plan):
    comparison, text = run(plan=plan, schedule=("one_f_one_b",), num_microbatches=8)
    assert [outcome.name for outcome in comparison.outcomes] == ["one_f_one_b"]
    assert "worker 3 |" in text
    assert "makespan 66 ms, bubble 27.3%" in text


def test_the_flags_reach_the_simulator(plan):
    fast, _ = run(plan=plan, schedule=("gpipe",), num_microbatches=8)
    slow, text = run(
        plan=plan,
        schedule=("gpipe",),
        num_microbatches=4,
        topology="4@1MB/s:20KiB",
        num_minibatches=2,
        optimizer_bytes_per_param_byte=0,
    )
    assert (fast.num_microbatches, slow.num_microbatches) == (8, 4)
    assert "4@1MB/s:20KiB" in text
    assert text.count("U") > 4
    assert slow.outcomes[0].peak_bytes == 2 * 200 + 4 * 4000 + 2 * 2000


def test_a_schedule_in_a_file(plan, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(str(one_f_one_b(4, 8)).replace("one_f_one_b", "mine"))
    comparison, _ = run(plan=plan, schedule=(str(path), "one_f_one_b"), num_microbatches=8)
    mine, theirs = comparison.outcomes
    assert (mine.name, mine.minibatch_s) == ("mine", theirs.minibatch_s)


def test_the_files(plan, tmp_path):
    out = tmp_path / "new" / "out"
    comparison, text = run(plan=plan, schedule=("gpipe", "pipedream"), out=out)
    assert f"into {out}" in text
    assert (out / "comparison.txt").read_text() == f"{comparison}\n"
    for name in ("timelines.png", "memory.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    processes = {
        event["pid"] for event in json.loads((out / "trace.json").read_text())["traceEvents"]
    }
    assert len(processes) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "gpip"], "Did you mean 'gpipe'?"),
        (["--schedule", "none.txt"], "'none.txt' cannot be read"),
        (["--schedule", "broken.txt"], "1B0 comes before 1F0"),
        (["--schedule", "pipedream_2bw", "--num-microbatches", "2"], "at least 4 microbatches"),
        (["--num-microbatches", "0"], "num_microbatches=0"),
        (["--num-minibatches", "0"], "--num-minibatches 0"),
        (["--topology", "4"], "gives no bandwidth"),
        (["--topology", "2@1GB/s"], "has 2. Use a larger topology"),
        (["--profile", "none.json"], "cannot read the profile none.json"),
        (["--plan", "none.json"], "cannot read the plan 'none.json'"),
        (["--out", "plan.json"], "plan.json is a file"),
    ],
)
def test_arguments_that_make_no_sense(plan, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.txt").write_text("worker 0: 0F0 0B0 0U0\nworker 1: 1B0 1F0 1U0")
    before = sorted(tmp_path.iterdir())
    if "--plan" not in arguments:
        arguments = ["--plan", str(plan), *arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in " ".join(error.split())
    assert sorted(tmp_path.iterdir()) == before
