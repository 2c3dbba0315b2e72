"""An NNX training loop through a pipeline of two stages; run it with python."""

import jax

jax.config.update("jax_num_cpu_devices", 2)  # only on a CPU: two devices to play with
import optax
from flax import nnx

import pdjax
from pdjax import data


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = images.reshape(len(images), -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def loss_fn(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


model, dataset = Classifier(nnx.Rngs(0)), data.load("digits", seed=0)
batches = data.batches(dataset.train, batch_size=64)
f = pdjax.nnx.functionalize(model, loss_fn)
pipe = pdjax.Pipeline(f.loss_fn, optax.adam(1e-3), num_stages=2, num_microbatches=4)
state = pipe.init(f.params, next(batches), model_state=f.model_state)
for _ in range(300):
    state, metrics = pipe.step(state, next(batches))
pdjax.nnx.update(model, pipe, state)
test = next(data.batches(dataset.test, batch_size=len(dataset.test)))
print(f"test accuracy {(model(test['x']).argmax(-1) == test['y']).mean():.1%}")
