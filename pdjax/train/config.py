"""What `python -m pdjax.train` can be told. The command line is made from this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Trains a model as a pipeline and compares it with one device."""

    model: str = "transformer"
    """transformer, mlp, vgg16 or vgg16_bn (with BatchNorm)."""

    data: str | None = None
    """stdlib (the source text of Python's standard library), digits (scikit-learn's handwritten
    digits), synthetic-text, synthetic-images, or text files: a path, or a glob in quotes such as
    'path/*.txt'. By default stdlib for text models, digits for image models."""

    schedule: str = "one_f_one_b"
    """model_parallel, gpipe, one_f_one_b, interleaved, zero_bubble_h1, zero_bubble_v (synchronous:
    the same numbers as on one device), pipedream, pipedream_vertical_sync, pipedream_2bw
    (asynchronous: never wait, with stale weights), a .txt file with a schedule, or auto (the
    fastest that fits into memory, by simulation)."""

    allow_stale: bool = False
    """Whether --schedule auto may choose an asynchronous schedule."""

    num_stages: int | None = None
    """Number of stages, one device each (several under interleaved and zero_bubble_v).
    On a CPU as many virtual devices are made as that takes. By default as many as --plan, --cuts or
    the schedule's file say, or as an automatic plan that may replicate finds best (see --straight);
    else what takes 2 devices, or one of each process if there are more."""

    straight: bool | None = None
    """Whether the automatic plan gives every stage one device, and replicates none. By default it
    does in one process, and does not where there are several."""

    num_chunks: int | None = None
    """Stages on each device under interleaved; by default 2."""

    num_microbatches: int | None = None
    """Microbatches in a minibatch. By default 1 for pipedream, else as many as divide the batch
    evenly, up to four for each device."""

    batch_size: int = 32
    """Examples in a minibatch."""

    steps: int = 300
    """Minibatches to train on."""

    learning_rate: float = 3e-3
    """Peak learning rate of Adam; it rises over the first tenth of the steps, then falls to a
    tenth of the peak along a cosine."""

    seed: int = 0
    """Decides the initial weights, the order of the data and the dropout."""

    output: Path | None = None
    """Directory for metrics.jsonl, summary.json and timeline.png; must not hold another
    run. By default runs/MODEL-SCHEDULE-1, or the next number that is free."""

    cuts: tuple[str, ...] = ()
    """Names of the layers or modules that begin the second, third, … stage, to place the cuts by
    hand."""

    remat: Literal["none", "full"] | None = None
    """full: the backward passes recompute the forward passes, which saves memory for time. By
    default as the plan says: none, but where memory would not suffice."""

    sequence_length: int = 128
    """Tokens in an example of text."""

    model_fields: tuple[str, ...] = ()
    """Sizes of the model, as NAME=VALUE, such as width=256 num_blocks=8 dropout=0.1."""

    eval_examples: int = 1024
    """At most so many held-out examples are used for the final evaluation."""

    nonfinite: Literal["raise", "ignore"] = "raise"
    """Whether to stop when the loss becomes NaN or infinite."""

    plan: str | None = None
    """auto (the default) to measure the layers and find the fastest pipeline, balanced for about
    equal estimated work, or the file of a plan that 'python -m pdjax.plan' wrote."""

    topology: str | None = None
    """How the devices are joined, for the plan: such as 2@10GB/s:16GiB; measured by default."""

    single_device: bool = True
    """Whether to measure the same model on one device beside the pipeline; never done where there
    are several processes."""

    coordinator: str | None = None
    """HOST:PORT at which all processes of a run reach the first one. Start the same command on
    every host, with its own --process-id. Under Slurm, Open MPI, Kubernetes, on TPU pods and under
    'python -m pdjax.launch' nothing has to be given."""

    num_processes: int | None = None
    """How many processes there are."""

    process_id: int | None = None
    """Which of them this one is, from 0. The first one reports, and writes the output."""

    start_timeout_s: float = 300.0
    """Seconds to wait for the other processes at the start."""

    lost_peer_timeout_s: float = 10.0
    """Seconds within which a process that is killed, hangs or cannot be reached ends all others."""


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

    straight: bool = False
    """Whether to replicate nothing."""

    remat: Literal["auto", "none", "full"] = "auto"
    """auto: stages may recompute their forward passes where memory is short; none, full: none or
    all of them do."""

    optimizer_bytes_per_param_byte: float = 2.0
    """Size of the optimizer state: 2 for Adam, 1 for momentum, 0 for plain SGD."""

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


@dataclass(frozen=True)
class SimulateConfig:
    """Simulates schedules for a plan, and compares what they take.

    Nothing is run: the figures are those of the profile, or those that the plan predicts for its
    stages. Give one --schedule to see its timeline, too.
    """

    plan: Path
    """The plan, as 'python -m pdjax.plan --output' wrote it."""

    profile: Path | None = None
    """The profile of the plan's layers. With it, schedules that need other stages than the plan has
    get stages that take about equally long; without it the model is taken to divide evenly."""

    schedule: tuple[str, ...] = ()
    """Which schedules: their names, or text files in the form that print(schedule) has. By default
    all by name: model_parallel, gpipe, one_f_one_b, interleaved, zero_bubble_h1, zero_bubble_v,
    pipedream, pipedream_vertical_sync, pipedream_2bw."""

    num_microbatches: int | None = None
    """Microbatches in a minibatch, of the size that the figures are for; by default as many as the
    plan was made for, or, if that was one, four for each worker. A schedule that divides
    minibatches otherwise (pipedream runs them whole) is taken to have microbatches that cost as
    much more."""

    topology: str | None = None
    """The machines, such as 4x4@10GB/s,1.25GB/s:16GiB; by default those that the plan was made
    for."""

    num_minibatches: int | None = None
    """Minibatches in the timelines; by default 1 of a schedule that is flushed, else enough to see
    it fill, run and drain."""

    optimizer_bytes_per_param_byte: float = 2.0
    """Size of the optimizer state: 2 for Adam, 1 for momentum, 0 for plain SGD."""

    out: Path | None = None
    """Directory for comparison.txt, timelines.png, memory.png and trace.json (which ui.perfetto.dev
    shows)."""


@dataclass(frozen=True)
class LaunchConfig:
    """Runs a command, given after --, in several processes of this machine.

    Their output comes with the number of the process before each line. If one fails the others are
    ended, and its exit code is returned.
    """

    num_processes: int
    """How many processes."""

    pin: bool = True
    """Whether each process gets a core of its own, in turns if there are fewer cores."""

    grace_s: float = 10.0
    """Seconds that a process has to end before it is killed."""
