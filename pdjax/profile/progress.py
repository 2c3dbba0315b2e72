"""How far a measurement is, shown as a bar or reported to a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

Report = Callable[[str, int, int], None]
"""Receives the name of the current step, the number of steps done, and their total number."""


@contextmanager
def reporting(progress: bool | Report, steps: int) -> Iterator[Report]:
    """A function that reports progress, to the caller's or to a bar on a terminal."""
    if callable(progress):
        yield progress
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("profiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    hidden = not (progress and console.is_terminal)
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("", total=steps)
        yield lambda what, done, _: bar.update(task, completed=done, description=what)
