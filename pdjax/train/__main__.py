"""`python -m pdjax.train`: trains a model as a pipeline and compares it with one device."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

import pdjax
from pdjax import data, distributed
from pdjax.cli import print_error, run_command
from pdjax.errors import ClusterError
from pdjax.pipeline.arguments import AUTO, choose_num_chunks, read_plan, read_schedule
from pdjax.pipeline.settings import may_replicate
from pdjax.plan import Plan
from pdjax.schedules import Schedule, find_algorithm
from pdjax.task import Task, make_task
from pdjax.topology.topology import Topology
from pdjax.train.baseline import SingleDevice
from pdjax.train.config import TrainConfig
from pdjax.train.data_check import check_same_task
from pdjax.train.loop import Speed, TrainingLoop, evaluate
from pdjax.train.outputs import RunDirectory, check_free, make_directory
from pdjax.train.progress import TrainingProgress

_NUM_DEVICES = 2  # where nothing is said, and there are no more processes


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    0 for success, 1 for a run that failed, 2 for arguments that make no sense.
    """
    try:
        return run_command("pdjax.train", TrainConfig, _train_together, arguments, wraps=True)
    except (pdjax.BrokenPipelineError, pdjax.NonFiniteLossError, ClusterError) as error:
        print_error(f"training stopped: {error}")
        return 1


def _train_together(config: TrainConfig, console: Console) -> None:
    """Brings this process together with the others, if there are several, and trains."""
    told = (config.coordinator, config.num_processes, config.process_id)
    if told != (None, None, None) or distributed.is_needed():
        peers = distributed.initialize(
            *told, timeout_s=config.start_timeout_s, lost_peer_timeout_s=config.lost_peer_timeout_s
        )
        console.quiet = peers.process_id > 0
    train(config, console)


def train(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Trains as `config` says; returns what summary.json holds.

    Raises:
        ValueError: if the configuration makes no sense; nothing is written then.
        NonFiniteLossError: if the loss becomes NaN or infinite.
    """
    _check(config)
    plan = read_plan(config.cuts or config.plan)
    schedule = read_schedule(config.schedule)
    chunks = choose_num_chunks(schedule, config.num_chunks)
    peers = distributed.current()
    num_processes = peers.num_processes if peers else 1
    together = num_processes > 1
    usual = max(_NUM_DEVICES, num_processes)
    replicate = may_replicate(config.replicate, together)
    num_stages = _num_stages(config, plan, schedule, usual * chunks, replicate)
    num_devices = _num_devices(config, plan, schedule, usual, chunks)
    make_devices(-(-num_devices // num_processes))
    task = make_task(
        config.model,
        config.data,
        seed=config.seed,
        sequence_length=config.sequence_length,
        model_fields=config.model_fields,
        initial="functions" if together else "arrays",
    )
    if peers is not None:
        check_same_task(peers, config, task)
    optimizer = optax.adam(_learning_rate(config))
    pipe = _make_pipeline(config, task, optimizer, schedule, plan, num_stages)
    _describe(console, config, task)
    batch = jax.tree.map(lambda leaf: np.stack([leaf] * config.batch_size), task.dataset.train[0])
    console.print("tracing, profiling and compiling …")
    state = pipe.init(
        task.params, batch, model_state=task.model_state, rng=jax.random.key(config.seed)
    )
    batches = data.batches(task.dataset.train, config.batch_size, reads=pipe.reads())
    baseline = None
    if config.single_device and peers is None:
        baseline = SingleDevice(task.loss_fn, optimizer, task.params, task.model_state)
        baseline.run([batch])
    if pipe.comparison is not None:
        console.print(str(pipe.comparison), markup=False, soft_wrap=True)
    console.print(f"schedule {pipe.schedule.name}, {pipe.schedule.num_microbatches} microbatches")
    console.print(str(pipe.plan), markup=False, soft_wrap=True)
    if pipe.plan.prediction is not None and jax.default_backend() == "cpu":
        console.print("(the prediction is for devices that have cores of their own)")
    output = None
    if peers is None or peers.process_id == 0:
        output = make_directory(config.output, f"{config.model}-{pipe.schedule.name}")
    with RunDirectory(output) as directory, TrainingProgress(console, config.steps) as progress:
        loop = TrainingLoop(config, batches, pipe, baseline, directory)
        state, speed = loop.run(state, progress)
        directory.write_ready(wait=True)
        held_out = evaluate(config, task, pipe, state)
        loop.record(state)
        directory.write_timeline(pipe.timeline())
        summary = _summarise(config, pipe, directory.losses, held_out, speed)
        directory.write_summary(summary)
    if output:
        _report(console, summary, held_out, output)
    return summary


_Planned = Any  # a Plan, the names of layers, "auto" or "balanced"


def _make_pipeline(
    config: TrainConfig,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: str | Schedule,
    plan: _Planned,
    num_stages: int | None,
) -> pdjax.Pipeline:
    return pdjax.Pipeline(
        task.loss_fn,
        optimizer,
        schedule=schedule,
        num_stages=num_stages,
        num_chunks=config.num_chunks,
        replicate=config.replicate,
        allow_stale=config.allow_stale,
        num_microbatches=config.num_microbatches,
        plan=plan,
        topology=config.topology,
        eval_loss_fn=task.eval_loss_fn,
        remat=config.remat,
        nonfinite=config.nonfinite,
    )


def _num_stages(
    config: TrainConfig, plan: _Planned, schedule: str | Schedule, usual: int, replicate: bool
) -> int | None:
    """How many stages are asked for; None if the plan or the schedule says it.

    A plan that may replicate stages does: with a stage for each device none would be left for it.
    """
    told = isinstance(plan, (Plan, tuple)) or config.num_stages is not None
    if told or isinstance(schedule, Schedule) or schedule == AUTO:
        return config.num_stages
    replicates = plan == AUTO and replicate and find_algorithm(schedule).replicates
    return None if replicates else usual


def _num_devices(
    config: TrainConfig, plan: _Planned, schedule: str | Schedule, usual: int, num_chunks: int
) -> int:
    """How many devices the run takes."""
    if isinstance(schedule, Schedule):
        return len(schedule.workers)
    if isinstance(plan, Plan):
        named = 1 + max((max(stage.workers) for stage in plan.stages), default=-1)
        return named or -(-plan.num_stages // num_chunks)
    if isinstance(plan, tuple):
        return -(-(len(plan) + 1) // num_chunks)
    if config.topology is not None:
        return Topology.parse(config.topology).num_workers
    stages = config.num_stages or usual * num_chunks
    return -(-stages // num_chunks)


def make_devices(num_devices: int) -> None:
    """Makes that many virtual CPU devices; on other platforms it changes nothing.

    It must come before JAX is first used; afterwards it does nothing.
    """
    with contextlib.suppress(RuntimeError):  # JAX runs already; Pipeline says if they are too few
        jax.config.update("jax_num_cpu_devices", num_devices)


def _check(config: TrainConfig) -> None:
    for name in (
        "num_stages",
        "num_chunks",
        "batch_size",
        "steps",
        "sequence_length",
        "eval_examples",
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1.")
    if not config.learning_rate > 0:
        raise ValueError(f"--learning-rate {config.learning_rate}: expected more than 0.")
    if config.cuts and config.plan:
        raise ValueError("got both --cuts and --plan; expected one of them.")
    if config.output is not None:
        check_free(config.output)


def _learning_rate(config: TrainConfig) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / 10,
        peak_value=config.learning_rate,
        warmup_steps=max(config.steps // 10, 1),
        decay_steps=max(config.steps, 2),
        end_value=config.learning_rate / 10,
    )


def _describe(console: Console, config: TrainConfig, task: Task) -> None:
    devices = jax.devices()
    console.print(
        f"{config.model}, {task.num_parameters:,} parameters; {task.dataset.description}",
        markup=False,
    )
    console.print(
        f"devices {', '.join(map(str, devices))}; seed {config.seed}",
        markup=False,
    )


def _summarise(
    config: TrainConfig,
    pipe: pdjax.Pipeline,
    losses: list[float],
    held_out: dict[str, float],
    speed: Speed,
) -> dict[str, Any]:
    return {
        "model": config.model,
        "schedule": pipe.schedule.name,
        "num_stages": pipe.plan.num_stages,
        "replicas": list(pipe.schedule.replicas),
        "num_microbatches": pipe.schedule.num_microbatches,
        "batch_size": config.batch_size,
        "steps": config.steps,
        "seed": config.seed,
        "initial_loss": losses[0],
        "final_loss": float(np.mean(losses[-10:])),
        "eval_loss": held_out["loss"],
        "eval_accuracy": held_out["accuracy"],
        "examples_per_s": speed.pipeline_examples_per_s,
        "single_device_examples_per_s": speed.single_examples_per_s,
        "stages": [list(pipe.plan.stage_layers(s)) for s in range(pipe.plan.num_stages)],
        "jax": jax.__version__,
        "platform": jax.default_backend(),
    }


def _report(
    console: Console, summary: dict[str, Any], held_out: dict[str, float], output: Path
) -> None:
    console.print(f"loss {summary['initial_loss']:.3f} → {summary['final_loss']:.3f}")
    console.print(f"held out: loss {held_out['loss']:.3f}, accuracy {held_out['accuracy']:.1%}")
    ours, single = summary["examples_per_s"], summary["single_device_examples_per_s"]
    if ours and single:
        console.print(
            f"{ours:,.0f} examples/s; the same model on one device {single:,.0f} examples/s "
            f"(ratio {ours / single:.2f})"
        )
        if summary["platform"] == "cpu":
            console.print(
                "(virtual CPU devices share the cores that one device has to itself, so this "
                "shows the cost of the pipeline, not its gain)"
            )
    console.print(f"metrics, summary and timeline picture are in {output}", markup=False)


if __name__ == "__main__":
    code = main()  # first: it replaces sys.exit, so that the other processes hear of the code
    sys.exit(code)
