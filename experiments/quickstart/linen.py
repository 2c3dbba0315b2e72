"""A Linen training loop through a pipeline of two stages; run it with python."""

from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 2)  # only on a CPU: two devices to play with
import flax.linen as nn
import optax

import pdjax
from pdjax import data


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        for _ in range(3):
            x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


def loss_fn(params, batch, rng):
    logits: Any = model.apply(params, batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean(), {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


model, dataset = Classifier(), data.load("digits", seed=0)
batches = data.batches(dataset.train, batch_size=64)
pipe = pdjax.Pipeline(loss_fn, optax.adam(1e-3), schedule="pipedream", num_stages=2)
state = pipe.init(model.init(jax.random.key(0), next(batches)["x"]), next(batches))
for _ in range(300):
    state, metrics = pipe.step(state, next(batches))
state = pipe.drain(state)
test = next(data.batches(dataset.test, batch_size=len(dataset.test)))
print(f"test accuracy {float(pipe.evaluate(state, test)['accuracy']):.1%}")
