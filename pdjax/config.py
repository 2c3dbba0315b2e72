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
    """model_parallel, gpipe, one_f_one_b (synchronous: the same numbers as on one device), or
    pipedream (asynchronous: never waits, with stale weights)."""

    num_stages: int = 2
    """Number of stages, one device each. On a CPU that many virtual devices are made."""

    num_microbatches: int | None = None
    """Microbatches in a minibatch. By default 1 for pipedream, else as many as divide the batch
    evenly, up to four for each stage."""

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

    remat: Literal["none", "full"] = "none"
    """full: the backward passes recompute the forward passes, which saves memory for time."""

    sequence_length: int = 128
    """Tokens in an example of text."""

    model_fields: tuple[str, ...] = ()
    """Sizes of the model, as NAME=VALUE, such as width=256 num_blocks=8 dropout=0.1."""

    eval_examples: int = 1024
    """At most so many held-out examples are used for the final evaluation."""

    nonfinite: Literal["raise", "ignore"] = "raise"
    """Whether to stop when the loss becomes NaN or infinite."""

    single_device: bool = True
    """Whether to measure the same model on one device beside the pipeline."""
