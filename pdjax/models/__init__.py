"""Models to train: plain Flax Linen, which knows nothing of pipelining.

Each model is one file with one module, called as ``model.apply(variables, x, train=True)``, and one
row of `MODELS`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn

from pdjax.models.mlp import MLP as MLP
from pdjax.models.transformer import Transformer as Transformer
from pdjax.models.vgg import VGG16 as VGG16


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A row of `MODELS`: what a model takes, and how to build it for a data set.

    Attributes:
        name: the model's name.
        takes: ``"text"``: integer tokens ``[batch, sequence]``; ``"image"``: float32 images
            ``[batch, height, width, channels]``.
        module: the module class.
        description: one line for a list of models.
        classes_field: the field of ``module`` that is set to the data set's number of classes.
        settings: other fields in which this row differs from the module's defaults.
        image_size: side in pixels that images must be resized to; None: they may stay as they are.
    """

    name: str
    takes: Literal["text", "image"]
    module: type[nn.Module]
    description: str
    classes_field: str = "num_classes"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_size: int | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the module's fields that `build` accepts as overrides."""
        hidden = {"parent", "name", self.classes_field}
        return tuple(f.name for f in dataclasses.fields(self.module) if f.name not in hidden)

    def build(self, num_classes: int, **overrides: Any) -> nn.Module:
        """Builds the model for a data set.

        Args:
            num_classes: number of classes, which for text is the size of the vocabulary.
            **overrides: values for fields of the module, in place of the defaults.

        Returns:
            The module, without variables.

        Raises:
            ValueError: an override is not one of `fields`.
        """
        for field in overrides:
            if field not in self.fields:
                raise ValueError(
                    f"model {self.name!r} cannot override {field!r}{_nearest(field, self.fields)}; "
                    f"its fields are {', '.join(self.fields)}"
                )
        return self.module(**{**self.settings, **overrides, self.classes_field: num_classes})


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="transformer",
            takes="text",
            module=Transformer,
            description="decoder-only language model on bytes or other tokens",
            classes_field="vocab_size",
        ),
        ModelSpec(
            name="mlp",
            takes="image",
            module=MLP,
            description="residual multilayer perceptron on flattened images",
        ),
        ModelSpec(
            name="vgg16",
            takes="image",
            module=VGG16,
            description="VGG-16, 13 convolutions and 3 dense layers",
            image_size=32,
        ),
        ModelSpec(
            name="vgg16_bn",
            takes="image",
            module=VGG16,
            description="VGG-16 with BatchNorm after each convolution",
            settings={"batch_norm": True},
            image_size=32,
        ),
    )
}
"""The models by name. A new model is one file beside this one, and one row here."""


def build_model(name: str, num_classes: int, **overrides: Any) -> nn.Module:
    """Builds a model of `MODELS` by name.

    Args:
        name: a key of `MODELS`.
        num_classes: number of classes, which for text is the size of the vocabulary.
        **overrides: values for fields of the module, in place of the defaults.

    Returns:
        The module, without variables.

    Raises:
        ValueError: there is no model of this name, or it has no field of an override's name.

    Example:
        >>> build_model("transformer", num_classes=256, num_blocks=12).num_blocks
        12
    """
    return find_model(name).build(num_classes, **overrides)


def find_model(name: str) -> ModelSpec:
    """The row of `MODELS` called ``name``.

    Raises:
        ValueError: there is none; the text names the nearest.
    """
    if name not in MODELS:
        raise ValueError(
            f"unknown model {name!r}{_nearest(name, tuple(MODELS))}; "
            f"the models are {', '.join(MODELS)}"
        )
    return MODELS[name]


def _nearest(name: str, names: tuple[str, ...]) -> str:
    """A question that suggests the nearest of ``names``, or nothing when none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {near[0]!r}?" if near else ""
