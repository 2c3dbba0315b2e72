"""What the layers of a model cost, as a value that can be saved, read and planned with.

Nothing here imports JAX.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

FORMAT = 1
"""Version of the JSON form."""


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
            if field.name != "name" and not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"layer {self.name!r}: {field.name} is {value}; expected a finite number that "
                    "is not negative."
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
        source: how the figures were found: ``"measured"``, ``"analytic"`` or ``"imported"``.
    """

    layers: tuple[LayerProfile, ...]
    batch_size: int | None = None
    device: str = ""
    model: str = ""
    jax_version: str = ""
    source: str = "imported"

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a profile has no layers; expected at least one.")

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

    def to_json(self) -> str:
        """The profile as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "profile") -> Profile:
        """Reads what `to_json` wrote.

        Args:
            text: the JSON text.
            where: the name of its file, for errors.

        Raises:
            ValueError: if it is no profile, or was written by a newer pdjax.
        """
        try:
            value: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}, line {error.lineno}: {error.msg}.") from None
        if not isinstance(value, dict) or "layers" not in value:
            raise ValueError(f"{where}: no profile: it has no 'layers'.")
        if value.pop("format", None) != FORMAT:
            raise ValueError(f"{where}: expected format {FORMAT}; make the profile anew.")
        try:
            layers = tuple(LayerProfile(**layer) for layer in value.pop("layers"))
            return cls(layers, **value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
