"""One process of the benchmark: it builds one system, and takes steps whenever it reads a line.

The line says how many; the answer, a line of JSON, is the time of a step in seconds: that from the
moment when the loss of the last uncounted step was ready to that of the last one, shared out.
"""

import argparse
import itertools
import json
import queue
import sys
import threading
import time

import jax
import jax.numpy as jnp
from models import NUM_BLOCKS, NUM_MICROBATCHES, make_model, make_optimizer

import pdjax
from pdjax import distributed
from pdjax.pipeline import prepared

UNCOUNTED = 4
SCHEDULES = {"1F1B": (pdjax.one_f_one_b, NUM_MICROBATCHES), "PipeDream": (pdjax.pipedream, 1)}


class Pipe:
    """Two stages, each in a process of its own, or both in this one."""

    def __init__(self, model, schedule, slack, devices=None):
        loss_fn, params, self.batch = make_model(model)
        make, count = SCHEDULES[schedule]
        self.pipe = pdjax.Pipeline(
            loss_fn,
            make_optimizer(),
            schedule=make(2, count, slack=slack),
            plan=[f"block_{NUM_BLOCKS // 2}"],
            devices=devices,
            nonfinite="ignore",
        )
        self.state = self.pipe.init(params, self.batch)

    def step(self):
        self.state, metrics = self.pipe.step(self.state, self.batch)
        return metrics["loss"]


def both_on_one():
    """The only device, twice: with two of them XLA would compute with two threads on one core."""
    return jax.devices() * 2


class Canned:
    """A transport that delivers the arrays of the other stage at once: numbers of its shapes.

    The executor then does all that one stage does in the pipeline, and nothing else.
    """

    def __init__(self, placements, mine):
        self.is_local = tuple(place == mine for place in range(len(placements)))
        self._device = next(iter(placements[mine].device_set))
        self._made = {}

    def _numbers(self, shapes):
        key = tuple((s.shape, str(s.dtype)) for s in shapes)
        if key not in self._made:
            made = [jax.random.normal(jax.random.key(0), s.shape, s.dtype) for s in shapes]
            self._made[key] = jax.device_put(made, self._device)
        return self._made[key]

    def send_recv(self, values, shapes, source, target):
        if self.is_local[source] == self.is_local[target]:
            return values
        return self._numbers(shapes) if self.is_local[target] else None

    def broadcast(self, values, shapes, source):
        del source
        return self._numbers(shapes) if values is None else values


class Stage(Pipe):
    """The programs of one stage of the pipeline, without waiting for the other."""

    def __init__(self, model, schedule, stage):
        prepared.make_transport = lambda placements, peers: Canned(placements, stage)
        super().__init__(model, schedule, slack=0, devices=both_on_one())
        self.stage = stage

    def step(self):
        super().step()
        # The loss is the other stage's: wait for the weights in its place.
        return _first(self.state.run.stages[self.stage].lasting.weights[0])


class Single:
    """A plain step of the whole model on the whole minibatch, or on microbatches one by one.

    Args:
        model: which one.
        count: of microbatches.
        loops: whether one jitted program loops over them; otherwise there is a call for each.
    """

    def __init__(self, model, count, loops):
        loss_fn, params, batch = make_model(model)
        self._count, self._loops = count, loops
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        self._parts = [_part(parts, at) for at in range(count)]
        self._batch = parts
        optimizer = make_optimizer()
        self.state = jax.tree.map(jnp.copy, params), optimizer.init(params)

        def add(total, params, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, part))

        def apply(state, total):
            params, opt = state
            loss, grads = jax.tree.map(lambda x: x / count, total)
            updates, opt = optimizer.update(grads, opt, params)
            return (jax.tree.map(jnp.add, params, updates), opt), loss

        def step(state, batch):
            params, _ = state
            if count == 1:
                return apply(state, jax.value_and_grad(loss_fn)(params, _part(batch, 0)))
            total = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
            total, _ = jax.lax.scan(lambda t, part: (add(t, params, part), None), total, batch)
            return apply(state, total)

        self._step = jax.jit(step, donate_argnums=0)
        self._one = jax.jit(jax.value_and_grad(loss_fn))
        self._add = jax.jit(add, donate_argnums=0)
        self._apply = jax.jit(apply, donate_argnums=0)

    def step(self):
        if self._loops:
            self.state, loss = self._step(self.state, self._batch)
            return loss
        total = self._one(self.state[0], self._parts[0])
        for part in self._parts[1:]:
            total = self._add(total, self.state[0], part)
        self.state, loss = self._apply(self.state, total)
        return loss


def _part(batch, at):
    return jax.tree.map(lambda x: x[at], batch)


_first = jax.jit(lambda leaf: leaf.ravel()[0])


def step_s(system, count):
    """Seconds of a step in the steady state."""
    losses, ready_s = queue.SimpleQueue(), []

    def watch():
        for loss in iter(losses.get, None):
            loss.block_until_ready()
            ready_s.append(time.perf_counter())

    thread = threading.Thread(target=watch)
    thread.start()
    outstanding = []
    for _ in range(UNCOUNTED + count):
        outstanding.append(system.step())
        losses.put(outstanding[-1])
        if len(outstanding) > 8:
            outstanding[-8].block_until_ready()
    losses.put(None)
    thread.join()
    return (ready_s[-1] - ready_s[UNCOUNTED - 1]) / count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("system")
    parser.add_argument("model")
    arguments = parser.parse_args()
    kind, _, detail = arguments.system.partition(":")
    if kind == "pipe":
        distributed.initialize()
    if kind in ("pipe", "both"):
        schedule, slack = detail.split(",")
        devices = both_on_one() if kind == "both" else None
        system = Pipe(arguments.model, schedule, int(slack), devices)
    elif kind == "stage":
        schedule, number = detail.split(",")
        system = Stage(arguments.model, schedule, int(number))
    else:
        system = Single(arguments.model, int(detail), loops=kind == "loop")
    step_s(system, 2)
    print(json.dumps("ready"), flush=True)
    for line in itertools.takewhile(str.strip, sys.stdin):
        print(json.dumps(step_s(system, int(line))), flush=True)


if __name__ == "__main__":
    main()
