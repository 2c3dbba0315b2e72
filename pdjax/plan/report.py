"""A plan as text for people.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pdjax.topology.topology import format_bytes

if TYPE_CHECKING:
    from pdjax.plan.plan import Plan, Prediction, Strategy

_LONGEST = 36  # characters of the name of a run of layers


def describe(plan: Plan) -> str:
    """The stages as a table; then, where it is known, what is predicted and the advice."""
    if not plan.stages:
        return _short(plan)
    parts = [lay_out(_stage_rows(plan))]
    if plan.prediction is not None:
        parts += [lay_out(_strategy_rows(plan.prediction)), plan.prediction.advice]
    return "\n\n".join(parts)


def format_seconds(seconds: float) -> str:
    """`seconds` for people: ``"12.3 ms"``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"


def _short(plan: Plan) -> str:
    rows = []
    for stage in range(plan.num_stages):
        layers = plan.stage_layers(stage)
        share = f"{plan.shares[stage]:6.1%} of the work" if plan.shares else ""
        span = layers[0] if len(layers) == 1 else f"{layers[0]} … {layers[-1]}"
        rows.append(f"stage {stage}: {len(layers):3d} layers {share}  {span}")
    return "\n".join(rows)


def _stage_rows(plan: Plan) -> list[list[str]]:
    repeats = any(stage.remat == "full" for stage in plan.stages)
    limited = any(stage.limit_bytes is not None for stage in plan.stages)
    head = ["stage", "layers", "workers", "time", "share", "in flight", "weights", "stash", "peak"]
    rows = [head + ["limit"] * limited + ["recomputes"] * repeats]
    for number, stage in enumerate(plan.stages):
        row = [
            str(number),
            _span(plan.stage_layers(number)),
            _runs(stage.workers),
            format_seconds(stage.stage_s),
            f"{plan.shares[number]:.1%}" if plan.shares else "",
            str(stage.in_flight),
            format_bytes(stage.param_bytes),
            format_bytes(stage.stash_bytes),
            format_bytes(stage.peak_bytes),
        ]
        if limited:
            row.append("" if stage.limit_bytes is None else format_bytes(stage.limit_bytes))
        if repeats:
            row.append("yes" if stage.remat == "full" else "")
        rows.append(row)
    return rows


def _span(layers: Sequence[str]) -> str:
    names = [layers[0]] if len(layers) == 1 else [layers[0], layers[-1]]
    room = _LONGEST // len(names)
    short = [name if len(name) <= room else f"{name[: room - 1]}…" for name in names]
    return f"{' … '.join(short)} ({len(layers)})"


def _runs(workers: Sequence[int]) -> str:
    """``"3: 0-2"`` for three workers in a row."""
    runs: list[list[int]] = []
    for worker in workers:
        if runs and worker == runs[-1][1] + 1:
            runs[-1][1] = worker
        else:
            runs.append([worker, worker])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:3])
    return f"{len(workers)}: {text}{', …' if len(runs) > 3 else ''}"


def _strategy_rows(prediction: Prediction) -> list[list[str]]:
    size = prediction.batch_size
    per = "sent/microbatch" if size is None else "sent/example"
    each = "microbatch" if prediction.num_microbatches == 1 else "minibatch"
    rows = [["", "workers", each, "examples/s", per, "peak", ""]]
    for strategy in (prediction.chosen, *prediction.others):
        rows.append(_strategy_row(strategy, prediction))
    return rows


def _strategy_row(strategy: Strategy, prediction: Prediction) -> list[str]:
    size = prediction.batch_size
    return [
        strategy.name,
        str(strategy.workers),
        format_seconds(strategy.microbatch_s * prediction.num_microbatches),
        "" if size is None else format_rate(size, strategy.microbatch_s),
        format_bytes(strategy.wire_bytes / (size or 1)),
        format_bytes(strategy.peak_bytes),
        "" if strategy.fits else "does not fit",
    ]


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
