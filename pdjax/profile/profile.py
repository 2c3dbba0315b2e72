"""What the layers of a model cost, as a value that can be saved, read and planned with.

Nothing here imports JAX.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from pdjax.errors import PdjaxWarning
from pdjax.serialization import check_fields, is_amount, is_count, read_object

FORMAT = 1
"""Version of the JSON form."""

SOURCES = ("measured", "analytic", "imported")
"""How the figures of a profile can have been found."""

_PER_EXAMPLE = ("forward_s", "backward_s", "spread_s", "cut_bytes", "stash_bytes", "flops")


@dataclass(frozen=True)
class LayerProfile:
    """What one layer costs for one microbatch.

    Attributes:
        name: the layer's name.
        forward_s: seconds of its forward pass.
        backward_s: seconds of its backward pass.
        cut_bytes: bytes that cross a cut right after it: every value made before it and used
            after it, once. A backward pass sends about as many back.
        param_bytes: bytes of its parameters.
        stash_bytes: bytes that wait between its forward and its backward pass.
        flops: operations of its forward pass.
        spread_s: half the distance between the quartiles of the measured seconds of both passes
            together; 0 if not measured.
    """

    name: str
    forward_s: float
    backward_s: float
    cut_bytes: float
    param_bytes: float
    stash_bytes: float = 0.0
    flops: float = 0.0
    spread_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and not is_amount(value):
                raise ValueError(
                    f"layer {self.name!r}: {field.name} is {value!r}; expected a finite number "
                    "that is not negative."
                )

    @property
    def compute_s(self) -> float:
        """Seconds of both passes."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Profile:
    """The layers of a model, in order, and what they were profiled with.

    Attributes:
        layers: the layers.
        batch_size: examples in the microbatch that the figures are for; None if unknown.
        device: kind of the device that the figures are for; "" if unknown.
        model: fingerprint of the traced model; "" if unknown.
        jax_version: the version of JAX that measured; "" if it was not JAX.
        dtype: the dtype that most bytes of the parameters have; "" if unknown.
        source: how the figures were found: ``"measured"``, ``"analytic"`` or ``"imported"``.
        inseparable: ranges of layers (first, last) that share a changing state: no cut may
            separate them.
        tied: ranges of layers (first, last) that use the same parameter: no cut may separate them
            under an asynchronous schedule.
    """

    layers: tuple[LayerProfile, ...]
    batch_size: int | None = None
    device: str = ""
    model: str = ""
    jax_version: str = ""
    source: str = "imported"
    dtype: str = ""
    inseparable: tuple[tuple[int, int], ...] = ()
    tied: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a profile has no layers; expected at least one.")
        if self.batch_size is not None:
            check_batch_size(self.batch_size)
        for field in ("device", "model", "jax_version", "dtype"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{field} is {getattr(self, field)!r}; expected a text.")
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}; expected one of {', '.join(SOURCES)}.")
        for field in ("inseparable", "tied"):
            for pair in getattr(self, field):
                if not _is_range(pair, len(self.layers)):
                    raise ValueError(
                        f"{field} has {pair!r}; expected pairs of layers, the first and the last "
                        f"of a range, from 0 to {len(self.layers) - 1}."
                    )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers, in order."""
        return tuple(layer.name for layer in self.layers)

    def total(self, field: str) -> float:
        """The sum of a field over all layers."""
        return sum(getattr(layer, field) for layer in self.layers)

    def column(self, field: str) -> Sequence[float]:
        """A field of every layer."""
        return [getattr(layer, field) for layer in self.layers]

    def rescaled(self, batch_size: int) -> Profile:
        """The profile for microbatches of another size, by simple proportion.

        Seconds, operations and the bytes of activations grow with the batch, those of parameters do
        not. A device is rarely that simple: small batches cost more than their share.

        Args:
            batch_size: examples in a microbatch.

        Returns:
            The profile itself if it is for that size; else another, with a `PdjaxWarning`.

        Raises:
            ValueError: if the profile does not say what batch size it is for.
        """
        check_batch_size(batch_size)
        if self.batch_size is None:
            raise ValueError(
                f"the profile does not say for which batch size it is, and {batch_size} is asked "
                "for. If it is the same, say so: dataclasses.replace(profile, "
                f"batch_size={batch_size}); else measure again."
            )
        if self.batch_size == batch_size:
            return self
        warnings.warn(
            f"the profile is for microbatches of {self.batch_size} examples; its seconds and the "
            f"bytes of its activations are scaled by {batch_size}/{self.batch_size}. A profile "
            f"that is measured with {batch_size} would be better.",
            PdjaxWarning,
            stacklevel=2,
        )
        ratio = batch_size / self.batch_size
        layers = (
            replace(layer, **{field: getattr(layer, field) * ratio for field in _PER_EXAMPLE})
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers), batch_size=batch_size)

    def to_json(self) -> str:
        """The profile as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the profile as JSON; `pdjax.profile.files.load_profile` reads it."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, text: str, where: str = "profile") -> Profile:
        """Reads what `to_json` wrote.

        Args:
            text: the JSON text.
            where: the name of its file, for errors.

        Raises:
            ValueError: if it is no profile, or was written by a newer pdjax.
        """
        value = read_object(text, where, what="profile", version=FORMAT)
        if not isinstance(value.get("layers"), list):
            raise ValueError(f"{where}: no profile: it has no list 'layers'.")
        check_fields(cls, value, where)
        for number, layer in enumerate(value["layers"], 1):
            check_fields(LayerProfile, layer, f"{where}, layer {number}")
        try:
            layers = tuple(LayerProfile(**layer) for layer in value.pop("layers"))
            for field in ("inseparable", "tied"):
                value[field] = tuple(map(tuple, value.get(field, ())))
            return cls(layers, **value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


def check_batch_size(batch_size: Any) -> None:
    """Raises ValueError unless `batch_size` is a whole number of at least 1."""
    if not is_count(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; expected a whole number of at least 1.")


def _is_range(pair: Any, num_layers: int) -> bool:
    if not isinstance(pair, tuple) or len(pair) != 2:
        return False
    return all(isinstance(at, int) for at in pair) and 0 <= pair[0] <= pair[1] < num_layers
