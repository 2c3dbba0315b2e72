"""Data to train on, through grain.

Each kind of source is one file and a row of `SOURCES`::

    dataset = pdjax.data.load("stdlib", seed=0)
    loader = pdjax.data.batches(dataset.train, batch_size=32)
    for batch in loader:          # {"x": [32, 128], "y": [32, 128]}, without end
        ...
    position = loader.get_state()
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import grain
import jax
import numpy as np

from pdjax.data import digits, synthetic, text
from pdjax.data.dataset import Dataset as Dataset
from pdjax.data.dataset import Example as Example
from pdjax.data.dataset import Kind as Kind


@dataclass(frozen=True)
class Source:
    """A row of `SOURCES`.

    Attributes:
        kind: what the examples look like.
        load: makes the data set, from ``seed`` and from ``sequence_length`` for text or
            ``image_size`` for images, all given by keyword.
        description: one line for a list of sources.
    """

    kind: Kind
    load: Callable[..., Dataset]
    description: str


SOURCES: dict[str, Source] = {
    "stdlib": Source("text", text.load_stdlib, "source of Python's standard library, as bytes"),
    "digits": Source("image", digits.load_digits, "scikit-learn's handwritten digits"),
    "synthetic-text": Source(
        "text", synthetic.load_synthetic_text, "tokens of a random Markov chain"
    ),
    "synthetic-images": Source(
        "image", synthetic.load_synthetic_images, "class prototypes plus noise"
    ),
}
"""The sources by name. Text files of one's own are a source too, by their path or a glob."""


def load(
    source: str, *, seed: int, sequence_length: int = 128, image_size: int | None = None
) -> Dataset:
    """Loads a data set.

    Args:
        source: a key of `SOURCES`, or the path of a text file, or a glob of several.
        seed: what the order of the training examples depends on, at least 0; the split
            of real data into training and test examples does not.
        sequence_length: tokens of an example, for text; images have no use for it.
        image_size: side in pixels to resize images to, or None for the side that they come with.

    Returns:
        The data set.

    Raises:
        ValueError: there is no such source, it does not fit the other arguments, or it cannot be
            read.

    Example:
        >>> load("digits", seed=0, image_size=32).test[0]["x"].shape
        (32, 32, 1)
    """
    row = _find(source)
    if seed < 0:
        raise ValueError(f"got seed={seed}, expected 0 or more")
    if row.kind == "image":
        return row.load(seed=seed, image_size=image_size)
    if image_size is not None:
        raise ValueError(
            f"got image_size={image_size} for {source!r}, which is text: leave it out, or load "
            f"images: {', '.join(name for name, row in SOURCES.items() if row.kind == 'image')}"
        )
    return row.load(seed=seed, sequence_length=sequence_length)


def batches(
    dataset: grain.MapDataset[Example], batch_size: int, *, reads: Mapping[str, bool] | None = None
) -> grain.DatasetIterator[Example]:
    """Iterates over a data set in batches.

    Only full batches come: where a finite data set ends, what is left of it is dropped. Batches of
    an endless one run across the borders of its epochs. The next batch is made when it is asked
    for, on the caller's thread, because its examples are in memory already.

    Args:
        dataset: the examples, such as `Dataset.train`.
        batch_size: number of examples of a batch.
        reads: the leaves that are wanted, as `pdjax.Pipeline.reads` says it of those that the
            stages of this process read; all if not given. Of the others only the shapes come.

    Returns:
        An iterator over batches, whose leaves have a leading axis of ``batch_size``. Its
        ``get_state()`` gives its position, which can be written as JSON, and ``set_state()``, on
        an iterator over the same data in batches of the same size, goes back to it.

    Raises:
        ValueError: ``batch_size`` is not positive, or is larger than the data set.

    Example:
        >>> next(batches(load("digits", seed=0).train, 32))["y"].shape
        (32,)
    """
    num_examples = _num_examples(dataset)
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"got batch_size={batch_size}, expected from 1 to {num_examples}, the number of "
            "examples of the data set: choose a smaller batch or load more data"
        )
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if reads is None or all(reads.values()):
        return iter(dataset.batch(batch_size, drop_remainder=True).to_iter_dataset(options))
    shapes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((batch_size, *np.shape(leaf)), np.asarray(leaf).dtype)
        for name, leaf in cast(Example, dataset[0]).items()
    }

    def only_read(example: Example) -> Example:
        # Something must be there to be counted.
        return {name: example[name] for name in example if reads[name]} or {"": np.zeros((), bool)}

    def completed(batch: Example) -> Any:
        return {name: batch.get(name, shape) for name, shape in shapes.items()}

    some = dataset.map(only_read).batch(batch_size, drop_remainder=True).map(completed)
    return iter(some.to_iter_dataset(options))


def _find(source: str) -> Source:
    """The row of `SOURCES` called ``source``, or one that reads the files of that path."""
    if source in SOURCES:
        return SOURCES[source]
    if any(mark in source for mark in "/\\*?[.~") or os.path.exists(source):
        return Source("text", functools.partial(text.load_files, source), "text files")
    near = difflib.get_close_matches(source, SOURCES, n=1)
    raise ValueError(
        f"unknown data source {source!r}{f', did you mean {near[0]!r}?' if near else ''}; the "
        f"sources are {', '.join(SOURCES)}, or text files as 'path/*.txt'"
    )


def _num_examples(dataset: grain.MapDataset[Example]) -> int:
    """Number of examples of an epoch of ``dataset``, also where it repeats without end."""
    while len(dataset) == sys.maxsize and len(dataset.parents) == 1:
        dataset = dataset.parents[0]
    return len(dataset)
