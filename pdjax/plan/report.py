"""A plan as text for people.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdjax.plan.figures import Prediction, StageFigures, Strategy
from pdjax.units import format_bytes, format_rate, format_seconds, lay_out

_LONGEST = 36  # characters of the name of a run of layers


def describe(
    layers: Sequence[Sequence[str]],
    shares: Sequence[float],
    stages: Sequence[StageFigures],
    prediction: Prediction | None,
) -> str:
    """A plan's stages as a table; then, where they are known, the predictions and the advice.

    Args:
        layers: for each stage the names of its layers.
        shares: for each stage its share of the work; empty if unknown.
        stages: for each stage its predicted figures; empty if there are none.
        prediction: the predictions for the whole plan.
    """
    if not stages:
        return _short(layers, shares)
    parts = [lay_out(_stage_rows(layers, shares, stages))]
    if prediction is not None:
        parts += [lay_out(_strategy_rows(prediction)), prediction.advice]
    return "\n\n".join(parts)


def _short(layers: Sequence[Sequence[str]], shares: Sequence[float]) -> str:
    rows = []
    for stage, names in enumerate(layers):
        share = f"{shares[stage]:6.1%} of the work" if shares else ""
        span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        rows.append(f"stage {stage}: {len(names):3d} layers {share}  {span}")
    return "\n".join(rows)


def _stage_rows(
    layers: Sequence[Sequence[str]], shares: Sequence[float], stages: Sequence[StageFigures]
) -> list[list[str]]:
    repeats = any(stage.remat == "full" for stage in stages)
    limited = any(stage.limit_bytes is not None for stage in stages)
    head = ["stage", "layers", "workers", "time", "share", "in flight", "weights", "stash", "peak"]
    rows = [head + ["limit"] * limited + ["recomputes"] * repeats]
    for number, stage in enumerate(stages):
        row = [
            str(number),
            _span(layers[number]),
            _runs(stage.workers),
            format_seconds(stage.stage_s),
            f"{shares[number]:.1%}" if shares else "",
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
    limit = [] if prediction.limit_s is None else ["limit"]
    rows = [["", "workers", each, *limit, "examples/s", per, "peak", ""]]
    for strategy in (prediction.chosen, *prediction.others):
        rows.append(_strategy_row(strategy, prediction))
    return rows


def _strategy_row(strategy: Strategy, prediction: Prediction) -> list[str]:
    size, limit = prediction.batch_size, []
    if prediction.limit_s is not None:  # of the chosen plan, which was simulated
        is_chosen = strategy is prediction.chosen
        limit = [format_seconds(prediction.limit_s) if is_chosen else ""]
    return [
        strategy.name,
        str(strategy.workers),
        format_seconds(strategy.microbatch_s * prediction.num_microbatches),
        *limit,
        "" if size is None else format_rate(size, strategy.microbatch_s),
        format_bytes(strategy.wire_bytes / (size or 1)),
        format_bytes(strategy.peak_bytes),
        "" if strategy.fits else "does not fit",
    ]
