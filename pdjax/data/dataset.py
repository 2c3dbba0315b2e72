"""What every source of data makes: a `Dataset` of grain pipelines."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, cast

import grain
import numpy as np

Kind = Literal["text", "image"]
"""``"text"``: x and y are int32 tokens ``[sequence]``, and y is x one token later. ``"image"``: x
is float32 ``[height, width, channels]`` and y its class, an int32 scalar."""

Example = dict[str, np.ndarray]
"""One example, ``{"x": input, "y": target}``; in a batch both have a leading batch axis."""


@dataclass(frozen=True)
class Dataset:
    """Examples to train on and others to test with.

    Attributes:
        name: the source that was asked for.
        kind: what an example looks like.
        train: training examples in a random order that depends on the seed and is another one in
            each epoch; never ends.
        test: held-out examples in an order that depends on nothing, so that its first few are
            always the same sample of them.
        num_classes: number of classes, which for text is the size of the vocabulary.
        description: one line on what was loaded, with its size.
        content: the arrays that the examples are made from.
    """

    name: str
    kind: Kind
    train: grain.MapDataset[Example]
    test: grain.MapDataset[Example]
    num_classes: int
    description: str
    content: tuple[np.ndarray, ...]

    def digest(self) -> str:
        """A short text that is another one for other data: of all that the examples are made from.

        Of noise that is drawn, and of the order, the first examples are looked at.
        """
        found = hashlib.sha256()
        first = [cast(Example, examples[0]) for examples in (self.train, self.test)]
        for array in (*self.content, *(leaf for example in first for leaf in example.values())):
            found.update(f"{array.dtype}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()[:12]


def shuffle_for_ever(examples: grain.MapDataset[Example], seed: int) -> grain.MapDataset[Example]:
    """Makes training examples endless, each epoch in an order of its own.

    The shuffle's own seed is derived from ``seed`` and not equal to it: grain shuffles epoch e with
    the sum of the shuffle's seed and e, so that of two runs with seeds 0 and 1 the first would see
    in its second epoch the order of the other's first.

    Args:
        examples: one epoch.
        seed: what the order depends on.

    Returns:
        The endless data set.
    """
    return examples.seed(seed).shuffle().repeat()
