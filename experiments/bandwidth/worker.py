"""The process of each host: builds a system, takes steps, and counts the bytes of its interface.

    python worker.py profile MODEL FILE          measures the layers, on one host
    python worker.py alone MODEL                 takes steps of the whole model on each host
    python worker.py SYSTEM MODEL PLAN STEPS     trains; the first process prints a line of JSON

A step is a minibatch: the examples that a host takes at a time, for each host under data
parallelism, for each of 16 microbatches under GPipe; there are more steps if minibatches are
smaller. The seconds are those between two losses far apart, in the steady state; where a step ends
with updates, between two of these.
"""

import json
import sys
import time
from pathlib import Path

import jax
from models import BATCH_SIZE, make_model, make_optimizer

import pdjax
from pdjax import distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
from counters import own_counters

STEPS_ALONE = 4
GPIPE_MICROBATCHES = 16  # as the planner has it: 4 for each stage
SCHEDULES = {
    "PipeDream": "pipedream",
    "PipeDream, 4 stages": "pipedream",
    "model parallel": "model_parallel",
    "GPipe": "gpipe",
}


def profile(model, path):
    loss_fn, init, batch = make_model(model, BATCH_SIZE[model])
    pipe = pdjax.Pipeline(loss_fn, make_optimizer(), schedule="pipedream")
    pipe.profile(jax.eval_shape(init), batch).save(path)


def alone(peers, loss_fn, optimizer, init, batch):
    """Says how long a step of the whole model takes on each of several hosts at once."""
    schedule = pdjax.one_f_one_b(1, 1)
    devices = jax.local_devices()[:1]
    pipe = pdjax.Pipeline(loss_fn, optimizer, schedule=schedule, plan="balanced", devices=devices)
    state, marks = pipe.init(init, batch), []
    for count in (2, STEPS_ALONE):
        for _ in range(count):
            state, _ = pipe.step(state, batch)
        jax.block_until_ready(state.run.stages[0].lasting.weights)
        peers.exchange("took some steps", None)
        marks.append(time.perf_counter())
    if peers.process_id == 0:
        step_s = (marks[1] - marks[0]) / STEPS_ALONE
        print("RESULT " + json.dumps({"step_s": step_s}), flush=True)


def make_pipeline(system, model, plan, num_hosts):
    """The pipeline, a function that makes its initial parameters, and a minibatch."""
    count = {"GPipe": GPIPE_MICROBATCHES, "data parallel": num_hosts}.get(system, 1)
    loss_fn, init, batch = make_model(model, BATCH_SIZE[model] * count)
    schedule = pdjax.one_f_one_b(1, num_hosts, replicas=(num_hosts,))
    if system != "data parallel":
        schedule = SCHEDULES[system]
    pipe = pdjax.Pipeline(
        loss_fn,
        make_optimizer(),
        schedule=schedule,
        num_microbatches=None if "PipeDream" in system else count,
        plan="balanced" if system == "data parallel" else plan,
    )
    return pipe, init, batch


def measure(pipe, state, batch, steps):
    """Seconds of a step, and bytes that this host sends in it, in the steady state."""
    metrics, marks = {}, []
    for count in (2 + pipe.schedule.lag, steps):
        for _ in range(count):
            state, metrics = pipe.step(state, batch)
        metrics["loss"].block_until_ready()
        if not pipe.schedule.lag:
            jax.block_until_ready([held.lasting.weights for held in state.run.stages])
        marks.append((time.perf_counter(), own_counters()))
    (start_s, before), (end_s, after) = marks
    return state, (end_s - start_s) / steps, (after - before).sent_bytes / steps


def train(system, model, plan, steps):
    peers = distributed.initialize()
    pipe, init, batch = make_pipeline(system, model, plan, peers.num_processes)
    state = pipe.init(init, batch)
    if pipe.schedule.num_microbatches == 1:
        steps *= peers.num_processes
    state, step_s, sent = measure(pipe, state, batch, steps)
    pipe.drain(state)
    said = peers.exchange("the measurement", [step_s, sent])
    if peers.process_id == 0:
        size = len(batch["y"])
        figures = {
            "system": system,
            "replicas": pipe.schedule.replicas,
            "examples_per_s": size / max(one for one, _ in said),
            "bytes_per_example": sum(one for _, one in said) / size,
        }
        print("RESULT " + json.dumps(figures), flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[0] == "profile":
        profile(given[1], given[2])
    elif given[0] == "alone":
        peers = distributed.initialize()
        loss_fn, init, batch = make_model(given[1], BATCH_SIZE[given[1]])
        alone(peers, loss_fn, make_optimizer(), init, batch)
    else:
        train(given[0], given[1], given[2], int(given[3]))
