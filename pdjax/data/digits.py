"""Scikit-learn's handwritten digits: real images that come with the library."""

from __future__ import annotations

import grain
import numpy as np

from pdjax.data.dataset import Dataset, Example, shuffle_for_ever

IMAGE_SIZE = 8
"""Side of the images in pixels as they come."""

TEST_FRACTION = 0.2
"""Share of the examples of each digit that is held out for testing."""

_SPLIT_SEED = 0  # fixed, so that no seed ever trains on what another one tests with


def load_digits(*, seed: int, image_size: int | None = None) -> Dataset:
    """Loads 1,797 images of handwritten digits, 8 × 8 × 1 with values from 0 to 1.

    Args:
        seed: what the order of the training examples depends on.
        image_size: side in pixels to enlarge the images to by repeating pixels, a multiple of 8;
            None leaves them at 8.

    Returns:
        The data set.

    Raises:
        ValueError: scikit-learn is not installed, or ``image_size`` is not a multiple of 8.
    """
    factor = _enlargement(image_size)
    images, labels = _read()
    train, test = _split(labels)
    return Dataset(
        name="digits",
        kind="image",
        train=shuffle_for_ever(_examples(images[train], labels[train], factor), seed),
        test=_examples(images[test], labels[test], factor),
        num_classes=10,
        description=(
            f"{len(images):,} handwritten digits of {factor * IMAGE_SIZE} × {factor * IMAGE_SIZE} "
            f"pixels, {len(test)} held out"
        ),
        content=(images[train], labels[train], images[test], labels[test]),
    )


def _enlargement(image_size: int | None) -> int:
    """The whole number that takes the images to ``image_size``."""
    if image_size is None:
        return 1
    if image_size < IMAGE_SIZE or image_size % IMAGE_SIZE:
        raise ValueError(
            f"got image_size={image_size} for the {IMAGE_SIZE} × {IMAGE_SIZE} images of 'digits', "
            f"expected a multiple of {IMAGE_SIZE}, such as 8, 16 or 32"
        )
    return image_size // IMAGE_SIZE


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Images, float32 ``[n, 8, 8, 1]`` in [0, 1], and labels, int32 ``[n]``."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(
            "the data set 'digits' comes with scikit-learn, which cannot be imported "
            f"({error}): install it with 'pip install scikit-learn', or use 'synthetic-images'"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    images = np.asarray(images, np.float32).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1) / 16
    return images, np.asarray(labels, np.int32)


def _split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test examples, each digit in the same proportion."""
    from sklearn import model_selection

    train, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=_SPLIT_SEED
    )
    return np.asarray(train), np.asarray(test)


def _examples(images: np.ndarray, labels: np.ndarray, factor: int) -> grain.MapDataset[Example]:
    """Examples of ``images``, each pixel repeated ``factor`` times both ways when it is read."""

    def example(index: int) -> Example:
        enlarged = images[index].repeat(factor, axis=0).repeat(factor, axis=1)
        return {"x": enlarged, "y": labels[index, ...]}

    return grain.MapDataset.range(len(labels)).map(example)
