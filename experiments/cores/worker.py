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
from pdjax import distributed, prepare

UNCOUNTED = 4


class Pipe:
    """Two stages, each in a process of its own, or both in this one."""

    def __init__(self, model, schedule, cut=NUM_BLOCKS // 2):
        loss_fn, params, self.batch = make_model(model)
        whole = schedule == "pipedream"
        self.pipe = pdjax.Pipeline(
            loss_fn,
            make_optimizer(),
            schedule=schedule,
            num_microbatches=None if whole else NUM_MICROBATCHES,
            plan=[f"block_{cut}"],
            nonfinite="ignore",
        )
        self.state = self.pipe.init(params, self.batch)

    def step(self):
        self.state, metrics = self.pipe.step(self.state, self.batch)
        return metrics["loss"]


class Canned:
    """A transport in which what the other stage sends is there at once: numbers of its shapes.

    The executor then does all that one stage does in the pipeline, and nothing else.
    """

    def __init__(self, placements, mine):
        self.here = tuple(place == mine for place in range(len(placements)))
        self._device = next(iter(placements[mine].device_set))
        self._made = {}

    def _numbers(self, shapes):
        key = tuple((s.shape, str(s.dtype)) for s in shapes)
        if key not in self._made:
            made = [jax.random.normal(jax.random.key(0), s.shape, s.dtype) for s in shapes]
            self._made[key] = jax.device_put(made, self._device)
        return self._made[key]

    def move(self, values, shapes, source, target):
        if self.here[source] == self.here[target]:
            return values
        return self._numbers(shapes) if self.here[target] else None

    def broadcast(self, values, shapes, source):
        del source
        return self._numbers(shapes) if values is None else values


class Stage(Pipe):
    """What one stage does in the pipeline, with nobody to wait for."""

    def __init__(self, model, schedule, stage):
        prepare.make_transport = lambda placements, peers: Canned(placements, stage)
        super().__init__(model, schedule)
        self.stage = stage

    def step(self):
        super().step()
        # The loss is the other stage's: wait for the weights in its place.
        return _first(self.state.run.stages[self.stage].weights[0])


class Single:
    """A plain jitted step of the whole model, over microbatches or over the whole minibatch."""

    def __init__(self, model, count):
        loss_fn, params, batch = make_model(model)
        self.batch = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        optimizer = make_optimizer()
        self.state = jax.tree.map(jnp.copy, params), optimizer.init(params)

        def step(state, batch):
            params, opt = state

            def add(total, part):
                loss, grads = jax.value_and_grad(loss_fn)(params, part)
                return jax.tree.map(jnp.add, total, (loss, grads)), None

            zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
            if count == 1:
                (loss, grads), _ = add(zeros, jax.tree.map(lambda x: x[0], batch))
            else:
                (loss, grads), _ = jax.lax.scan(add, zeros, batch)
            loss, grads = jax.tree.map(lambda x: x / count, (loss, grads))
            updates, opt = optimizer.update(grads, opt, params)
            return (jax.tree.map(jnp.add, params, updates), opt), loss

        self._step = jax.jit(step, donate_argnums=0)

    def step(self):
        self.state, loss = self._step(self.state, self.batch)
        return loss


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
        system = Pipe(arguments.model, detail)
    elif kind == "stage":
        jax.config.update("jax_num_cpu_devices", 2)
        schedule, number = detail.split(",")
        system = Stage(arguments.model, schedule, int(number))
    else:
        system = Single(arguments.model, int(detail))
    step_s(system, 2)
    print(json.dumps("ready"), flush=True)
    for line in itertools.takewhile(str.strip, sys.stdin):
        print(json.dumps(step_s(system, int(line))), flush=True)


if __name__ == "__main__":
    main()
