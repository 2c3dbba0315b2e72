"""The speed at which a device computes and moves memory, for an analytic profile.

Nothing here imports JAX.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

FLOPS_EFFICIENCY = 0.4
"""The share of a device's published peak of operations that a training step is taken to reach."""

BYTES_EFFICIENCY = 0.7
"""The share of its published memory bandwidth."""

_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_TEXT = re.compile(
    r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kMGTP]?)FLOP/s\s*,"
    r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kMGTP]?)B/s\s*"
)


@dataclass(frozen=True)
class Rates:
    """The operations and the memory traffic of a device in a second.

    Example:
        >>> find_rates("15TFLOP/s,900GB/s")
        Rates(flops_per_s=15000000000000.0, bytes_per_s=900000000000.0, name='')

    Attributes:
        flops_per_s: floating-point operations; a multiply-add counts as two.
        bytes_per_s: bytes that it reads from and writes to its memory.
        name: a part of the kind of the device, such as ``"a100"``; "" if it is for no special one.
    """

    flops_per_s: float
    bytes_per_s: float
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("flops_per_s", "bytes_per_s"):
            value = getattr(self, field)
            if not 0 < value < math.inf:
                raise ValueError(f"rates: {field} is {value}; expected a positive finite number.")


def _published(name: str, flops_per_s: float, bytes_per_s: float) -> Rates:
    return Rates(flops_per_s * FLOPS_EFFICIENCY, bytes_per_s * BYTES_EFFICIENCY, name)


RATES: dict[str, Rates] = {
    # The makers' data sheets: dense matrix products, boards with SXM sockets. JAX multiplies
    # float32 matrices in TF32 where there are tensor cores for it.
    "v100": _published("v100", 15.7e12, 900e9),  # float32
    "v100-fp16": _published("v100", 125e12, 900e9),
    "a100": _published("a100", 156e12, 2039e9),  # TF32; 80 GB
    "a100-bf16": _published("a100", 312e12, 2039e9),
    "h100": _published("h100", 494e12, 3350e9),  # TF32
    "h100-bf16": _published("h100", 989e12, 3350e9),
    # One core at 3 GHz with two 8-wide float32 multiply-adds a cycle.
    "cpu": _published("cpu", 96e9, 12e9),
}
"""Published peaks times `FLOPS_EFFICIENCY` and `BYTES_EFFICIENCY`, by short name. The two shares
are rough: a measurement is better wherever there is a device to measure on."""


def find_rates(text: str) -> Rates:
    """The rates of a device, by its short name in `RATES` or as ``"15TFLOP/s,900GB/s"``.

    Rates given in the second form are taken as they are: the speed that is reached, not the peak.

    Raises:
        ValueError: if it is neither; the text lists the known names.
    """
    if text.lower() in RATES:
        return RATES[text.lower()]
    match = _TEXT.fullmatch(text)
    if match is None:
        near = difflib.get_close_matches(text.lower(), RATES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown rates {text!r}{hint}; expected one of {', '.join(RATES)}, or a form like "
            "'15TFLOP/s,900GB/s'."
        )
    try:
        flops, size = float(match[1]), float(match[3])
    except ValueError:
        raise ValueError(f"rates {text!r}: {match[1]!r} or {match[3]!r} is no number.") from None
    return Rates(flops * _FACTORS[match[2]], size * _FACTORS[match[4]])
