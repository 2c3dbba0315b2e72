"""Trains a task through a pipeline, and measures it beside one device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

import pdjax
from pdjax import data
from pdjax.task import Task
from pdjax.train.baseline import SingleDevice
from pdjax.train.config import TrainConfig
from pdjax.train.outputs import RunDirectory
from pdjax.train.progress import TrainingProgress

_ROUNDS = 5  # turns in which pipeline and single device are measured alternately
_RECORDED = 3  # cycles at the end that the timeline shows, and a few more under PipeDream


@dataclass
class Speed:
    """Seconds and examples of the measured rounds.

    Attributes:
        pipeline_s: for each round the seconds that the pipeline took.
        single_s: for each round the seconds that one device took for the same minibatches.
        examples: examples in a round.
    """

    examples: int
    pipeline_s: list[float] = field(default_factory=list)
    single_s: list[float] = field(default_factory=list)

    @property
    def pipeline_examples_per_s(self) -> float | None:
        """Median throughput of the pipeline."""
        return self._rate(self.pipeline_s)

    @property
    def single_examples_per_s(self) -> float | None:
        """Median throughput of one device."""
        return self._rate(self.single_s)

    def _rate(self, seconds: list[float]) -> float | None:
        return float(self.examples / np.median(seconds)) if seconds else None


class TrainingLoop:
    """Takes the steps of a run.

    The last third of them (at most 50) is divided into rounds; after each, one device trains a
    model of its own on the same minibatches, so that both are measured under the same conditions.

    A step returns before its work is done. Progress therefore counts finished steps, those whose
    loss is ready; the loop looks at losses without waiting for them.
    """

    def __init__(
        self,
        config: TrainConfig,
        batches: Iterator[Any],
        pipe: pdjax.Pipeline,
        baseline: SingleDevice | None,
        directory: RunDirectory,
    ) -> None:
        self._config = config
        self._pipe = pipe
        self._baseline = baseline
        self._directory = directory
        self._batches = batches
        self._num_dispatched = 0
        self._busy_s = 0.0

    def run(self, state: pdjax.PipelineState, progress: TrainingProgress) -> Any:
        """Takes all steps; returns the state after the last drain, and the `Speed`."""
        steps = self._config.steps
        per_round = min(steps // 3, 50) // _ROUNDS
        speed = Speed(examples=per_round * self._config.batch_size)
        state = self._steps(state, steps - per_round * _ROUNDS, progress)
        for _ in range(_ROUNDS if per_round else 0):
            batches = [next(self._batches) for _ in range(per_round)]
            before = self._busy_s
            state = self._steps(state, per_round, progress, batches)
            speed.pipeline_s.append(self._busy_s - before)
            if self._baseline:
                speed.single_s.append(self._baseline.run(batches))
        return self._pipe.drain(state), speed

    def _steps(
        self,
        state: pdjax.PipelineState,
        count: int,
        progress: TrainingProgress,
        batches: list[Any] | None = None,
    ) -> pdjax.PipelineState:
        start, already = time.perf_counter(), self._busy_s
        metrics: dict[str, Any] = {}
        for index in range(count):
            batch = batches[index] if batches else next(self._batches)
            state, metrics = self._pipe.step(state, batch)
            self._busy_s = already + time.perf_counter() - start
            self._directory.add(self._num_dispatched, metrics, self._busy_s)
            self._num_dispatched += 1
            self._report(progress)
        jax.block_until_ready(metrics)
        _wait_for(state)
        self._busy_s = already + time.perf_counter() - start
        self._directory.write_ready(wait=True)
        self._report(progress)
        return state

    def _report(self, progress: TrainingProgress) -> None:
        """Reports the finished steps: those whose losses the directory has."""
        losses = self._directory.losses
        if losses:
            rate = len(losses) * self._config.batch_size / self._busy_s
            progress.update(len(losses), losses[-1], rate)

    def record(self, state: pdjax.PipelineState) -> pdjax.PipelineState:
        """Takes a few more steps to see when every program runs; the last ones are shown."""
        schedule = self._pipe.schedule
        for _ in range((schedule.lag + 1) * schedule.num_minibatches):
            state, _ = self._pipe.step(state, next(self._batches))
        _wait_for(state)
        with self._pipe.record(state):
            for _ in range((schedule.lag + _RECORDED) * schedule.num_minibatches):
                state, _ = self._pipe.step(state, next(self._batches))
        return self._pipe.drain(state)


def _wait_for(state: pdjax.PipelineState) -> None:
    """Returns when the weights of this process are ready; no other has to send it any."""
    jax.block_until_ready([held.lasting.weights for held in state.run.stages])


def evaluate(
    config: TrainConfig, task: Task, pipe: pdjax.Pipeline, state: pdjax.PipelineState
) -> dict[str, float]:
    """The mean loss and accuracy over held-out examples, at most `config.eval_examples`."""
    test = task.dataset.test[: config.eval_examples]
    size = min(config.batch_size, len(test))
    totals: dict[str, list[float]] = {}
    for batch in data.batches(test, size, reads=pipe.reads()):
        for name, value in pipe.evaluate(state, batch).items():
            totals.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in totals.items()}
