"""Shows how a run goes: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

_LINES = 10  # lines for a run whose output is not a terminal


class TrainingProgress:
    """Reports loss and speed while a run goes on. A context manager."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._next_line = 1
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, figures="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, finished: int, loss: float, examples_per_s: float) -> None:
        """Reports the number of finished steps, the loss of the last one, and the throughput.

        Args:
            finished: steps whose loss is ready; steps that are only dispatched do not count.
            loss: the loss of the last of them.
            examples_per_s: examples of these steps over the seconds since training began.
        """
        figures = f"loss {loss:.4f}  {_rate(examples_per_s)} examples/s"
        self._bar.update(self._task, completed=finished, figures=figures)
        if not self._console.is_terminal and finished * _LINES >= self._next_line * self._steps:
            self._console.print(f"step {finished}/{self._steps}  {figures}")
            self._next_line = finished * _LINES // self._steps + 1


def _rate(per_s: float) -> str:
    """Digits that tell: ``"1,204"``, ``"5.31"``."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"
