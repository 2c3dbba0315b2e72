"""Data made from a seed, with a structure that a model can learn, for tests and benchmarks."""

from __future__ import annotations

import grain
import numpy as np

from pdjax.data.dataset import Dataset, Example, shuffle_for_ever

VOCAB_SIZE = 64
"""Number of different tokens of the text."""

TRANSITION_PROBABILITIES = (0.5, 0.25, 0.125, 0.125)
"""How likely each of the four tokens is that may follow a token; their entropy, 1.21 nats, is the
lowest loss that a model can reach."""

NUM_CLASSES = 10
"""Number of classes of the images."""

IMAGE_SIZE = 32
"""Side of the images in pixels where none is asked for."""

NUM_TRAIN = 4096
"""Number of training examples, of either kind."""

NUM_TEST = 512
"""Number of test examples, of either kind."""


def load_synthetic_text(*, seed: int, sequence_length: int) -> Dataset:
    """Makes text of a Markov chain: each token is followed by one of four others.

    Args:
        seed: what the chain, the text and the order of the training examples depend on.
        sequence_length: tokens of an example.

    Returns:
        The data set.

    Raises:
        ValueError: ``sequence_length`` is not positive.
    """
    if sequence_length < 1:
        raise ValueError(f"got sequence_length={sequence_length}, expected at least 1 token")
    tokens = _markov_chains(np.random.default_rng(seed), NUM_TRAIN + NUM_TEST, sequence_length + 1)
    return Dataset(
        name="synthetic-text",
        kind="text",
        train=shuffle_for_ever(_sequences(tokens[:NUM_TRAIN]), seed),
        test=_sequences(tokens[NUM_TRAIN:]),
        num_classes=VOCAB_SIZE,
        description=(
            f"{len(tokens):,} sequences of {sequence_length} tokens of a Markov chain, "
            f"{NUM_TEST} held out; the lowest loss is {lowest_text_loss():.2f} nats a token"
        ),
        content=(tokens,),
    )


def load_synthetic_images(*, seed: int, image_size: int | None = None) -> Dataset:
    """Makes colour images: the prototype of a class, plus as much noise as there is signal.

    Args:
        seed: what the prototypes, the noise and the order of the training examples depend on.
        image_size: side of the images in pixels; None stands for 32.

    Returns:
        The data set.

    Raises:
        ValueError: ``image_size`` is not positive.
    """
    size = IMAGE_SIZE if image_size is None else image_size
    if size < 1:
        raise ValueError(f"got image_size={size}, expected at least 1 pixel")
    shape = (NUM_CLASSES, size, size, 3)
    prototypes = np.random.default_rng(seed).standard_normal(shape, np.float32)
    images = _noisy_images(prototypes, seed)
    return Dataset(
        name="synthetic-images",
        kind="image",
        train=shuffle_for_ever(images[:NUM_TRAIN], seed),
        test=images[NUM_TRAIN:],
        num_classes=NUM_CLASSES,
        description=(
            f"{len(images):,} noisy images of {NUM_CLASSES} prototypes, {size} × {size} pixels, "
            f"{NUM_TEST} held out"
        ),
        content=(prototypes,),
    )


def lowest_text_loss() -> float:
    """Mean loss in nats a token of a model that knows the Markov chain."""
    probabilities = np.array(TRANSITION_PROBABILITIES)
    return float(-(probabilities * np.log(probabilities)).sum())


def _markov_chains(rng: np.random.Generator, num_chains: int, length: int) -> np.ndarray:
    """Draws independent runs of one random Markov chain, uint8 ``[num_chains, length]``."""
    branches = len(TRANSITION_PROBABILITIES)
    # Tokens follow and are followed by four others each, so all are equally frequent.
    order, places = rng.permutation(VOCAB_SIZE), rng.permutation(VOCAB_SIZE)
    successors = order[(places[:, None] + np.arange(branches)) % VOCAB_SIZE]
    choices = rng.choice(branches, size=(num_chains, length), p=TRANSITION_PROBABILITIES)
    tokens = np.empty((num_chains, length), np.uint8)
    tokens[:, 0] = rng.integers(VOCAB_SIZE, size=num_chains)
    for t in range(1, length):
        tokens[:, t] = successors[tokens[:, t - 1], choices[:, t]]
    return tokens


def _sequences(tokens: np.ndarray) -> grain.MapDataset[Example]:
    """One example a row of ``tokens``."""

    def example(index: int) -> Example:
        row = tokens[index].astype(np.int32)
        return {"x": row[:-1], "y": row[1:]}

    return grain.MapDataset.range(len(tokens)).map(example)


def _noisy_images(prototypes: np.ndarray, seed: int) -> grain.MapDataset[Example]:
    """Training and then test examples, made when they are read and the same at every reading."""

    def example(index: int) -> Example:
        label = index % NUM_CLASSES
        noise = np.random.default_rng((seed, index)).standard_normal(
            prototypes.shape[1:], np.float32
        )
        return {"x": prototypes[label] + noise, "y": np.array(label, np.int32)}

    return grain.MapDataset.range(NUM_TRAIN + NUM_TEST).map(example)
