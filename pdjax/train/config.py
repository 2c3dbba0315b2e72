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
    the schedule's file say, or as an automatic plan that may replicate finds best (see
    --replicate); else what takes 2 devices, or one of each process if there are more."""

    replicate: bool | None = None
    """Whether the automatic plan may give a stage several devices, its replicas. By default not in
    one process, but where there are several."""

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
