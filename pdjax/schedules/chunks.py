"""Schedules in which every worker runs several stages, its chunks."""

from __future__ import annotations

from collections.abc import Sequence


def num_workers_of(
    name: str, num_stages: int, num_chunks: int, allowed: Sequence[int] | None = None
) -> int:
    """The number of workers for a number of stages.

    Args:
        name: of the schedule.
        num_stages: number of stages on all workers together.
        num_chunks: stages on each worker.
        allowed: the numbers of chunks for which the schedule is defined; all if None.

    Raises:
        ValueError: if the stages cannot be shared out.
    """
    if num_chunks < 1 or (allowed and num_chunks not in allowed):
        wanted = f"{', '.join(map(str, allowed))}" if allowed else "at least 1"
        raise ValueError(f"{name} with num_chunks={num_chunks}; expected {wanted}.")
    if num_stages % num_chunks:
        more = -(-num_stages // num_chunks) * num_chunks
        raise ValueError(
            f"{name} runs {num_chunks} stages on each worker, which {num_stages} stages do not "
            f"divide into. Use num_stages={more}, or another num_chunks."
        )
    return num_stages // num_chunks
