"""`python -m pdjax.plan`: the fastest pipeline for a model on some machines."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

from pdjax.cli import run_command
from pdjax.plan import Plan, PlanOptions
from pdjax.plan.figure import save_plan
from pdjax.profile.files import load_profile
from pdjax.profile.measure import measure
from pdjax.profile.profile import Profile
from pdjax.profile.rates import find_rates
from pdjax.profile.roofline import estimate
from pdjax.simulate import plan_pipeline
from pdjax.task import make_task
from pdjax.topology.topology import Topology
from pdjax.trace.layers import LayerGraph, build_graph
from pdjax.trace.random_key import taking_key

_BATCH_SIZE = 32


@dataclass(frozen=True)
class PlanConfig:
    """Finds the fastest pipeline for a model on some machines, and says what it predicts.

    The model's figures come from a file (--profile), or from one of pdjax's models (--model), which
    is measured here on one device, or estimated (--rates).
    """

    topology: str
    """The machines, from the inside out: 4x4@10GB/s,1.25GB/s:16GiB are four hosts of four workers,
    with 10 GB/s for each worker inside a host and 1.25 GB/s for each host, and 16 GiB for each
    worker. Without :16GiB memory is not limited. 'python -m pdjax.bandwidth' measures it."""

    profile: Path | None = None
    """A profile: JSON, or a graph.txt of the original PipeDream."""

    model: str | None = None
    """transformer, mlp, vgg16 or vgg16_bn (with BatchNorm)."""

    output: Path | None = None
    """Where to write the plan, as JSON; 'python -m pdjax.train --plan' reads it."""

    picture: Path | None = None
    """Where to draw the plan, as PNG or SVG."""

    save_profile: Path | None = None
    """Where to write the profile that was measured or estimated, as JSON."""

    schedule: str = "pipedream"
    """Name of a schedule: decides what has to be kept in memory, and whether the pipeline fills and
    drains with every minibatch. 'python -m pdjax.simulate' compares all of them for a plan."""

    num_microbatches: int = 1
    """Microbatches in a minibatch; the profile is for one microbatch."""

    num_stages: int | None = None
    """Exactly how many stages; by default as many as are best."""

    replicate: bool = True
    """Whether stages may have several workers, their replicas."""

    remat: Literal["auto", "none", "full"] = "auto"
    """auto: stages may recompute their forward passes where memory is short; none, full: none or
    all of them do."""

    optimizer_bytes_per_param_byte: float = 2.0
    """Size of the optimizer state: 2 for Adam, 1 for momentum, 0 for plain SGD."""

    slack: int | None = None
    """Forward passes of each stage beyond the smallest warm-up; by default chosen by simulation."""

    update_lag: int | None = None
    """Rounds by which updates of replicated stages are late, under pipedream; by default chosen by
    simulation."""

    overlap: bool = False
    """Whether stages compute while their replicas are synchronised, as where updates are a round
    late (update_lag=1)."""

    sync: Literal["ring", "paper", "original"] = "ring"
    """What an all-reduce over m replicas sends for each byte of weights: ring 2(m-1)/m, paper
    2(m-1) (the formula of PipeDream's paper), original 4(m-1)/m (its code)."""

    batch_size: int | None = None
    """Examples in a microbatch: 32 by default with --model. A --profile for another size is
    rescaled, with a warning."""

    rates: str | None = None
    """With --model: estimate instead of measuring, for a device by name (v100, a100, h100, …) or
    rates such as 15TFLOP/s,900GB/s. Nothing is run then, so the model need not fit."""

    sequence_length: int = 128
    """With --model: tokens in an example of text."""

    model_fields: tuple[str, ...] = ()
    """With --model: its sizes, as NAME=VALUE, such as width=256 num_blocks=8."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for arguments that make no sense."""
    return run_command("pdjax.plan", PlanConfig, plan_model, arguments)


def plan_model(config: PlanConfig, console: Console) -> Plan:
    """Plans as `config` says; writes the files that it names.

    Raises:
        ValueError: if the configuration makes no sense or nothing fits; nothing is written then.
    """
    topology, options = Topology.parse(config.topology), _options(config)
    _check_outputs(config)
    profile = _profile(config)
    plan = plan_pipeline(profile, topology, options)
    console.print(_heading(config, profile), markup=False)
    console.print(f"{plan}", markup=False)
    for path, save in (
        (config.save_profile, profile.save),
        (config.output, plan.save),
        (config.picture, lambda path: save_plan(plan, profile, path)),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path)
            console.print(f"wrote {path}", markup=False)
    return plan


def _options(config: PlanConfig) -> PlanOptions:
    return PlanOptions(
        schedule=config.schedule,
        num_microbatches=config.num_microbatches,
        num_stages=config.num_stages,
        replicate=config.replicate,
        remat=config.remat,
        optimizer_bytes_per_param_byte=config.optimizer_bytes_per_param_byte,
        overlap=config.overlap,
        slack=config.slack,
        update_lag=config.update_lag,
        sync=config.sync,
    )


def _check_outputs(config: PlanConfig) -> None:
    for name in ("output", "picture", "save_profile"):
        path: Path | None = getattr(config, name)
        if path is not None and path.is_dir():
            raise ValueError(f"--{name.replace('_', '-')} {path} is a directory; expected a file.")
    if config.picture is not None and config.picture.suffix not in (".png", ".svg"):
        raise ValueError(f"--picture {config.picture}; expected a name that ends in .png or .svg.")


def _heading(config: PlanConfig, profile: Profile) -> str:
    what = config.model or config.profile
    size = "" if profile.batch_size is None else f", {profile.batch_size} examples a microbatch"
    where = f" for {profile.device}" if profile.device else ""
    return (
        f"{what}: {len(profile.layers)} layers, {profile.source}{where}{size}; "
        f"{config.schedule} on {config.topology}\n"
    )


def _profile(config: PlanConfig) -> Profile:
    if (config.profile is None) == (config.model is None):
        raise ValueError("expected one of --profile FILE and --model NAME.")
    if config.profile is not None:
        profile = load_profile(config.profile)
        return profile if config.batch_size is None else profile.rescaled(config.batch_size)
    batch_size = _BATCH_SIZE if config.batch_size is None else config.batch_size
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: expected at least 1.")
    rates = None if config.rates is None else find_rates(config.rates)
    graph = _graph(config, batch_size)
    if rates is not None:
        return estimate(graph, rates, batch_size=batch_size)
    return measure(graph, batch_size=batch_size, device=jax.local_devices()[0], progress=True)


def _graph(config: PlanConfig, batch_size: int) -> LayerGraph:
    task = make_task(
        config.model or "",
        sequence_length=config.sequence_length,
        model_fields=config.model_fields,
        initial="shapes",
    )

    def many(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype)

    return build_graph(
        taking_key(task.loss_fn, task.model_state is not None),
        task.params,
        jax.tree.map(many, task.dataset.train[0]),
        jax.random.key(0),
        model_state=task.model_state,
    )


if __name__ == "__main__":
    sys.exit(main())
