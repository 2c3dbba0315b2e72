"""Figures as text for people: seconds, rates, bytes, tables.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence


def format_seconds(seconds: float) -> str:
    """`seconds` for people: ``"12.3 ms"``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"


def format_rate(count: int, seconds: float) -> str:
    """`count` per second, for people: ``"1,204"``."""
    rate = count / seconds if seconds else float("inf")
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def lay_out(rows: Sequence[Sequence[str]]) -> str:
    """A table of rows, the first one its head: text to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if _is_text(at, rows) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_text(column: int, rows: Sequence[Sequence[str]]) -> bool:
    return rows[0][column] in ("", "layers", "workers", "stage", "schedule")


BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
"""Factors of the binary prefixes of a size."""


def format_bytes(size: float) -> str:
    """`size` for people: ``"11.3 GiB"``."""
    unit = max((u for u, f in BINARY.items() if abs(size) >= f), key=BINARY.__getitem__, default="")
    return f"{size / BINARY[unit]:.1f} {unit}B" if unit else f"{size:.0f} B"
