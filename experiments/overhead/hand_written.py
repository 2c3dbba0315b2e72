"""The pipeline that an expert would write by hand for the toy model, and nothing but that.

1F1B over a list of blocks. The forward pass of a stage returns only those residuals that are not
inputs of the stage, the last stage does both passes in one program, gradients are accumulated
inside the backward pass. There is no tracing, no plan, no check, no metric.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding


class HandWritten:
    """A pipeline of `num_stages` equal stages over `blocks`, each called as block_fn(p, x)."""

    def __init__(self, block_fn, blocks, loss_fn, optimizer, num_stages, num_microbatches):
        self.num_stages, self.num_microbatches = num_stages, num_microbatches
        self.places = [SingleDeviceSharding(d) for d in jax.devices()[:num_stages]]
        per_stage = len(blocks) // num_stages
        self.weights = [
            jax.device_put(
                jax.tree.map(jnp.copy, blocks[s * per_stage : (s + 1) * per_stage]), place
            )
            for s, place in enumerate(self.places)
        ]
        self.state = [
            jax.device_put(optimizer.init(w), place)
            for w, place in zip(self.weights, self.places, strict=True)
        ]
        self.gradients = [
            jax.device_put(jax.tree.map(jnp.zeros_like, w), place)
            for w, place in zip(self.weights, self.places, strict=True)
        ]
        self.forward, self.backward = [], []
        for s in range(num_stages - 1):
            forward, backward = self._passes(block_fn, self.places[s], keep_input=s > 0)
            self.forward.append(forward)
            self.backward.append(backward)
        self.last = self._last(block_fn, loss_fn, self.places[-1])
        self.update = [self._update(optimizer, place) for place in self.places]
        self.order = self._order()

    def _passes(self, block_fn, place, keep_input):
        def run(weights, x):
            for w in weights:
                x = block_fn(w, x)
            return x

        kept = {}

        def forward(weights, x):
            y, pull_back = jax.vjp(run, weights, x)
            residuals, kept["tree"] = jax.tree.flatten(pull_back)
            inputs = {id(leaf): at for at, leaf in enumerate(jax.tree.leaves((weights, x)))}
            kept["from"] = [inputs.get(id(leaf)) for leaf in residuals]
            own = [leaf for leaf in residuals if id(leaf) not in inputs]
            return y, own, (x if keep_input else None)

        def backward(total, weights, x, own, cotangent):
            inputs, own = jax.tree.leaves((weights, x)), iter(own)
            residuals = [next(own) if at is None else inputs[at] for at in kept["from"]]
            grads, back = jax.tree.unflatten(kept["tree"], residuals)(cotangent)
            return jax.tree.map(jnp.add, total, grads), back

        where = {"in_shardings": place, "out_shardings": place}
        return jax.jit(forward, **where), jax.jit(backward, donate_argnums=0, **where)

    def _last(self, block_fn, loss_fn, place):
        def loss(weights, x, y):
            for w in weights:
                x = block_fn(w, x)
            return loss_fn(x, y)

        def both(total, weights, x, y):
            value, (grads, back) = jax.value_and_grad(loss, argnums=(0, 1))(weights, x, y)
            return jax.tree.map(jnp.add, total, grads), back, value

        return jax.jit(both, donate_argnums=0, in_shardings=place, out_shardings=place)

    def _update(self, optimizer, place):
        def update(weights, state, total):
            mean = jax.tree.map(lambda g: g / self.num_microbatches, total)
            updates, state = optimizer.update(mean, state, weights)
            zeros = jax.tree.map(jnp.zeros_like, total)
            return optax.apply_updates(weights, updates), state, zeros

        return jax.jit(update, donate_argnums=(0, 1, 2), in_shardings=place, out_shardings=place)

    def _order(self):
        n, m = self.num_stages, self.num_microbatches
        lists = []
        for s in range(n):
            warm_up = min(n - 1 - s, m)
            actions = [("F", i) for i in range(warm_up)]
            for i in range(m - warm_up):
                actions += [("F", i + warm_up), ("B", i)]
            lists.append(actions + [("B", i) for i in range(m - warm_up, m)])
        done, order, at = set(), [], [0] * n
        while any(at[s] < len(lists[s]) for s in range(n)):
            for s in range(n):
                if at[s] < len(lists[s]):
                    kind, i = lists[s][at[s]]
                    step = s - 1 if kind == "F" else s + 1
                    if step in (-1, n) or (kind, step, i) in done:
                        done.add((kind, s, i))
                        order.append((kind, s, i))
                        at[s] += 1
        return order

    def step(self, x, y):
        """One minibatch; returns the microbatches' losses."""
        size = x.shape[0] // self.num_microbatches
        xs = [x[i * size : (i + 1) * size] for i in range(self.num_microbatches)]
        ys = [y[i * size : (i + 1) * size] for i in range(self.num_microbatches)]
        last = self.num_stages - 1
        inputs = {(0, i): part for i, part in enumerate(xs)}
        stash, back, losses = {}, {}, []
        for kind, s, i in self.order:
            if s == last:
                if kind == "F":
                    self.gradients[s], back[s - 1, i], loss = self.last(
                        self.gradients[s], self.weights[s], inputs.pop((s, i)), ys[i]
                    )
                    losses.append(loss)
            elif kind == "F":
                given = inputs.pop((s, i))
                inputs[s + 1, i], own, kept = self.forward[s](self.weights[s], given)
                stash[s, i] = own, given if kept is None else kept
            else:
                own, given = stash.pop((s, i))
                self.gradients[s], back[s - 1, i] = self.backward[s](
                    self.gradients[s], self.weights[s], given, own, back.pop((s, i))
                )
        for s in range(self.num_stages):
            self.weights[s], self.state[s], self.gradients[s] = self.update[s](
                self.weights[s], self.state[s], self.gradients[s]
            )
        return losses
