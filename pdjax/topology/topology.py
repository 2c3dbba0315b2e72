"""The machines: how many workers, how they are joined, and how much memory each has.

A topology is a value with levels from the inside out. Four GPUs of a host on NVLink, and four such
hosts on a network, are ``4x4@100GB/s,1.25GB/s:16GiB``:

    4x4               4 workers make a unit, 4 of these units make the next one
    100GB/s,1.25GB/s  bandwidth of a worker's link in its host, and of a host's link in the network
    16GiB             memory of each worker

Nothing here imports JAX.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import groupby

from pdjax.units import BINARY

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_FACTORS = _DECIMAL | BINARY
_QUANTITY = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*(k|M|G|T|Ki|Mi|Gi|Ti)?(B|b|bit)(/s)?")
_FORM = "expected a form like '4x4@10GB/s,1.25GB/s:16GiB'"


@dataclass(frozen=True)
class Level:
    """One level of a topology.

    Attributes:
        num_units: how many units of the level below (workers, on the innermost) make one here.
        bandwidth_bytes_per_s: of the link by which each of them is joined to the others.
    """

    num_units: int
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        if self.num_units < 1:
            raise ValueError(f"a level has {self.num_units} units; expected at least 1.")
        if not 0 < self.bandwidth_bytes_per_s < math.inf:
            raise ValueError(
                f"a level has a bandwidth of {self.bandwidth_bytes_per_s} bytes/s; expected a "
                "positive number. Leave a link out by making the level one unit."
            )


@dataclass(frozen=True)
class Topology:
    """The workers and their links.

    Example:
        >>> topology = Topology.parse("4x2@10GB/s,1.25GB/s:16GiB")
        >>> topology.num_workers
        8
        >>> str(topology)
        '4x2@10GB/s,1.25GB/s:16GiB'

    Attributes:
        levels: from the inside out.
        memory_bytes: for each worker, in the order of the levels, its memory; empty if unlimited.
    """

    levels: tuple[Level, ...]
    memory_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("a topology has no level; expected at least one.")
        if self.memory_bytes and len(self.memory_bytes) != self.num_workers:
            raise ValueError(
                f"memory is given for {len(self.memory_bytes)} workers of {self.num_workers}; "
                "expected one size for each, or none."
            )
        if any(size <= 0 for size in self.memory_bytes):
            raise ValueError(f"a worker has {min(self.memory_bytes)} bytes of memory.")

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return math.prod(level.num_units for level in self.levels)

    @classmethod
    def uniform(
        cls, num_workers: int, bandwidth_bytes_per_s: float, memory_bytes: int | None = None
    ) -> Topology:
        """Equal workers on equal links."""
        memory = () if memory_bytes is None else (memory_bytes,) * num_workers
        return cls((Level(num_workers, bandwidth_bytes_per_s),), memory)

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Reads the short text form.

        Args:
            text: ``UNITSxUNITS…@BANDWIDTH,BANDWIDTH…[:MEMORY]``, everything from the inside out.
                Bandwidths are in B/s or, with a small b, bit/s; sizes with k, M, G, T or Ki, Mi,
                Gi, Ti. MEMORY is one size for all workers, or ``COUNT*SIZE,COUNT*SIZE…``.

        Raises:
            ValueError: if it is not in that form; the text names the part.
        """
        shape, at, rest = text.strip().partition("@")
        if not at:
            raise ValueError(f"topology {text!r} gives no bandwidth; {_FORM}.")
        speeds, _, memory = rest.partition(":")
        units = [_parse_count(part, text) for part in shape.split("x")]
        bandwidths = [_parse_quantity(part, "/s", text) for part in speeds.split(",")]
        if len(units) != len(bandwidths):
            raise ValueError(
                f"topology {text!r} has {len(units)} levels but {len(bandwidths)} bandwidths; "
                "expected one for each level, from the inside out."
            )
        levels = tuple(Level(n, speed) for n, speed in zip(units, bandwidths, strict=True))
        num_workers = math.prod(units)
        return cls(levels, _parse_memory(memory, num_workers, text) if memory else ())

    def __str__(self) -> str:
        shape = "x".join(str(level.num_units) for level in self.levels)
        speeds = ",".join(f"{_decimal(level.bandwidth_bytes_per_s)}/s" for level in self.levels)
        groups = [(size, len(list(same))) for size, same in groupby(self.memory_bytes)]
        if len(groups) > 1:
            memory = ":" + ",".join(f"{count}*{_binary(size)}" for size, count in groups)
        else:
            memory = f":{_binary(groups[0][0])}" if groups else ""
        return f"{shape}@{speeds}{memory}"


def _parse_count(part: str, text: str) -> int:
    if not part.strip().isdecimal():
        raise ValueError(f"topology {text!r}: {part!r} is not a number of units; {_FORM}.")
    return int(part)


def _parse_quantity(part: str, per: str, text: str) -> float:
    match = _QUANTITY.fullmatch(part.strip())
    if match is None or (match[4] or "") != per:
        kind = "bandwidth, such as 10GB/s or 25Gbit/s" if per else "size, such as 16GiB"
        raise ValueError(f"topology {text!r}: {part!r} is not a {kind}; {_FORM}.")
    try:
        number = Decimal(match[1])
    except InvalidOperation:
        raise ValueError(f"topology {text!r}: {match[1]!r} is not a number; {_FORM}.") from None
    bits = 1 if match[3] == "B" else 8
    return float(number * Decimal(_FACTORS[match[2] or ""]) / bits)


def _parse_memory(memory: str, num_workers: int, text: str) -> tuple[int, ...]:
    sizes: list[int] = []
    for part in memory.split(","):
        count, star, size = part.rpartition("*")
        repeats = _parse_count(count, text) if star else (num_workers if "," not in memory else 1)
        sizes += [int(_parse_quantity(size, "", text))] * repeats
    return tuple(sizes)


def _decimal(amount: float) -> str:
    unit = max(
        (u for u, f in _DECIMAL.items() if amount >= f), key=_DECIMAL.__getitem__, default=""
    )
    number = Decimal(repr(amount)) / Decimal(_DECIMAL[unit])
    return f"{number.normalize():f}{unit}B"


def _binary(size: int) -> str:
    exact = [unit for unit, factor in BINARY.items() if size % factor == 0]
    unit = max(exact, key=BINARY.__getitem__, default="")
    return f"{size // int(_FACTORS[unit])}{unit}B"
