"""The toy model trained by SpectraX (`pip install spectrax-lib`), for comparison only.

SpectraX cuts a function into stages at its `sxstage_iter` marks, compiles each stage for its own
device, and runs them in the order of a schedule (`sxjit` with `Std1F1B`). `sxvalue_and_grad` gives
the loss and the gradients, which stay on their stages; the optimizer is left to the user, here one
jitted update for each stage.

This file only calls SpectraX (AGPL-3.0); no code of it is copied, and pdjax does not need it.
"""

from __future__ import annotations

import os

# SpectraX writes several hundred words into the log for each of the first steps; it reads the level
# from here when it is imported.
os.environ.setdefault("LOGGING_LEVEL_ED", "WARNING")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from spectrax.runtime import (  # pyright: ignore[reportMissingImports]
    sxjit,
    sxstage_iter,
    sxvalue_and_grad,
)
from spectrax.runtime.schedules import Std1F1B  # pyright: ignore[reportMissingImports]
from spectrax.runtime.types import MpMdMesh  # pyright: ignore[reportMissingImports]


class SpectraX:
    """1F1B over equal stages of `params` (a dict of blocks, each called as block_fn(p, x))."""

    def __init__(self, params, num_stages, num_microbatches, *, block_fn, loss_fn, optimizer):
        devices = jax.devices()[:num_stages]
        # create_mesh() insists on all devices; 2 stages use 2 of the 4.
        mesh = MpMdMesh(Mesh(np.array(devices), ("stage",)), "stage")
        places = [mesh.sub_sharding(s) for s in range(num_stages)]
        blocks, per_stage = list(params.values()), len(params) // num_stages
        # The updates donate the weights, and the caller's must survive: hence the copies.
        self.weights = [
            jax.device_put(
                jax.tree.map(jnp.copy, blocks[s * per_stage : (s + 1) * per_stage]), place
            )
            for s, place in enumerate(places)
        ]
        self.state = [
            jax.device_put(optimizer.init(w), place)
            for w, place in zip(self.weights, places, strict=True)
        ]
        # The inputs must lie on the stage that reads them, or SpectraX refuses them. Given a
        # sharding on a mesh instead of a bare device, it would compile their split into
        # microbatches anew in every step.
        self.first, self.last = devices[0], devices[-1]

        def loss(weights, x, y):
            for s, stage in enumerate(weights):
                if s > 0:
                    x = sxstage_iter(x)
                for w in stage:
                    x = block_fn(w, x)
            return loss_fn(x, y)

        schedule = Std1F1B(microbatches=num_microbatches)
        self.value_and_grad = sxvalue_and_grad(
            sxjit(loss, mesh=mesh, schedule=schedule, batch_argnums=(1, 2))
        )
        self.update = [self._update(optimizer, place) for place in places]

    def _update(self, optimizer, place):
        def update(weights, state, gradients):
            updates, state = optimizer.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state

        return jax.jit(update, donate_argnums=(0, 1), in_shardings=place, out_shardings=place)

    def gradients(self, batch):
        """The mean loss, and the mean gradients as a list of blocks for each stage."""
        x, y = jax.device_put(batch["x"], self.first), jax.device_put(batch["y"], self.last)
        loss, (gradients,) = self.value_and_grad(self.weights, x, y)
        return loss, gradients

    def step(self, batch):
        loss, gradients = self.gradients(batch)
        for s, update in enumerate(self.update):
            self.weights[s], self.state[s] = update(self.weights[s], self.state[s], gradients[s])
        return self.weights, loss
