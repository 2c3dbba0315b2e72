"""Process 1 ends after two minibatches, though with an exit code; process 0 goes on to train."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))

import zoo

import pdjax
from pdjax import distributed

peers = distributed.initialize()
case = zoo.dense_blocks(num_blocks=2)
batch = case.make_batch(8, 0)
pipe = pdjax.Pipeline(case.loss_fn, optax.sgd(0.1), num_stages=2, plan="balanced")
state = pipe.init(case.params, batch)
for _ in range(2):
    state, metrics = pipe.step(state, batch)
if peers.process_id == 1:
    jax.block_until_ready(metrics)
    raise SystemExit(3)
if sys.argv[1] == "knows":
    while not peers.ended():
        time.sleep(0.01)
while True:
    state, _ = pipe.step(state, batch)
