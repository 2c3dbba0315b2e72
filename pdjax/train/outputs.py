"""The directory that a run writes."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from pdjax.timeline.figure import save_timeline
from pdjax.timeline.timeline import Timeline

_FILES = ("metrics.jsonl", "summary.json", "timeline.png")


def make_directory(wish: Path | None, name: str) -> Path:
    """The directory to write to, made if it is not there: the wish, or the next one in `runs`.

    Raises:
        ValueError: as `check_free`.
    """
    if wish is not None:
        check_free(wish)
        wish.mkdir(parents=True, exist_ok=True)
        return wish
    number = 1
    while True:
        try:
            made = Path("runs") / f"{name}-{number}"
            made.mkdir(parents=True)
            return made
        except FileExistsError:  # an older run, or one that has just begun
            number += 1


def check_free(wish: Path) -> None:
    """Raises ValueError if a directory cannot be written to: it is a file, or holds a run."""
    if wish.exists() and not wish.is_dir():
        raise ValueError(f"--output {wish} is a file; expected a directory, new or empty.")
    held = [file for file in _FILES if (wish / file).exists()]
    if held:
        raise ValueError(
            f"--output {wish} holds another run ({', '.join(held)}). Give a new directory, or "
            "move the old run away."
        )


class RunDirectory:
    """Writes metrics.jsonl as metrics become ready, and the other files at the end.

    A context manager: leaving it writes the metrics that are still outstanding.

    Args:
        path: the directory; None to keep the losses only, in a process that writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.losses: list[float] = []
        self._file = None if path is None else (path / _FILES[0]).open("w")
        self._waiting: deque[tuple[int, dict[str, Any], float]] = deque()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.write_ready(wait=True)
        except Exception:
            if error is None:
                raise
        finally:
            if self._file:
                self._file.close()

    def add(self, step: int, metrics: dict[str, Any], elapsed_s: float) -> None:
        """Notes the metrics of a step, which need not be ready."""
        self._waiting.append((step, metrics, elapsed_s))
        self.write_ready(wait=False)

    def write_ready(self, *, wait: bool) -> None:
        """Writes a line for each step whose metrics are there, in order; or for all of them."""
        while self._waiting and (wait or self._waiting[0][1]["loss"].is_ready()):
            step, metrics, elapsed_s = self._waiting.popleft()
            values = {name: float(value) for name, value in metrics.items()}
            self.losses.append(values["loss"])
            values = {name: v if math.isfinite(v) else None for name, v in values.items()}
            line = {"step": step, **values, "elapsed_s": round(elapsed_s, 4)}
            if self._file:
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, with null for what is not finite."""
        summary = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in summary.items()
        }
        if self.path:
            (self.path / _FILES[1]).write_text(json.dumps(summary, indent=1) + "\n")

    def write_timeline(self, timeline: Timeline) -> None:
        """Draws timeline.png."""
        if self.path:
            save_timeline(timeline, self.path / _FILES[2])
