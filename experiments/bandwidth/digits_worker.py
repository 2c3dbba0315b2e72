"""Trains a small VGG-16 on the handwritten digits until the test accuracy is reached.

    python digits_worker.py SYSTEM RATE PLAN EXAMPLES FILE

With several processes they share the work; alone, the same numbers are computed on virtual devices
of this process. FILE gets a line of JSON for each minibatch: the examples seen so far, the seconds
since the first minibatch was handed over, the loss; and at each test the accuracy.
"""

import itertools
import json
import sys
import time
from typing import Any

import jax
import numpy as np
import optax

import pdjax
from pdjax import data, distributed
from pdjax.task import make_task

NUM_WORKERS, EXAMPLES_PER_WORKER, GOAL = 4, 8, 0.97
TEST_EVERY = 512
"""Examples between two tests, which are not timed."""

TASK: Any = {
    "model_name": "vgg16",
    "data_source": "digits",
    "model_fields": ("width_multiplier=0.25", "dense_width=1024", "dropout=0.1"),
}


def make_pipeline(system, task, rate, plan):
    """The pipeline and the size of a minibatch. Alone, data parallelism is one large minibatch."""
    together = distributed.current() is not None
    common = {"eval_loss_fn": task.eval_loss_fn, "devices": jax.devices()}
    optimizer = optax.adam(rate)
    if system == "PipeDream":
        pipe = pdjax.Pipeline(task.loss_fn, optimizer, schedule="pipedream", plan=plan, **common)
        return pipe, EXAMPLES_PER_WORKER
    replicas = (NUM_WORKERS,) if together else (1,)
    schedule = pdjax.one_f_one_b(1, NUM_WORKERS, replicas=replicas)
    pipe = pdjax.Pipeline(task.loss_fn, optimizer, schedule=schedule, plan="balanced", **common)
    return pipe, EXAMPLES_PER_WORKER * NUM_WORKERS


def accuracy(pipe, state, task):
    """The share of the test examples that are classified rightly."""
    found = [
        float(pipe.evaluate(state, batch)["accuracy"])
        for batch in data.batches(task.dataset.test, 120, reads=pipe.reads())
    ]
    return float(np.mean(found))


def train(pipe, size, task, num_examples, write):
    """Trains until the goal, or for so many examples."""
    batches = data.batches(task.dataset.train, size)
    batch = next(batches)
    state = pipe.init(task.params, batch, rng=jax.random.key(0))
    seconds, started, waiting = 0.0, time.perf_counter(), []
    for number in itertools.count(1):
        state, metrics = pipe.step(state, batch)
        batch = next(batches)
        waiting.append((number * size, metrics["loss"]))
        if number * size % TEST_EVERY:
            continue
        waiting[-1][1].block_until_ready()
        passed = time.perf_counter() - started
        for at, (seen, loss) in enumerate(waiting, 1):  # evenly, from one test to the next
            at_s = seconds + passed * at / len(waiting)
            write({"examples": seen, "seconds": at_s, "loss": float(loss)})
        seconds, waiting = seconds + passed, []
        reached = accuracy(pipe, state, task)
        write({"examples": number * size, "seconds": seconds, "accuracy": reached})
        if reached >= GOAL or number * size >= num_examples:
            return
        started = time.perf_counter()


def main(system, rate, plan, num_examples, path):
    peers = distributed.initialize() if distributed.is_needed() else None
    if peers is None:
        jax.config.update("jax_num_cpu_devices", NUM_WORKERS)
    task = make_task(**TASK)
    pipe, size = make_pipeline(system, task, float(rate), plan)
    lines = []
    train(pipe, size, task, int(num_examples), lines.append)
    if peers is None or peers.process_id == 0:
        with open(path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main(*sys.argv[1:6])
