"""Parts of which schedules are built: replicas, warm-ups, alternating passes, virtual stages.

Microbatch b of a stage with r replicas goes to its replica b mod r. The gradients of r consecutive
microbatches, a *round*, are averaged and applied together. Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pdjax.schedules.action import Action, ActionKind


def warm_ups(replicas: Sequence[int], slack: int = 0) -> tuple[int, ...]:
    """For each stage how many forward passes a replica does before its first backward pass.

    None on the last stage; on any other as many rounds as the next stage needs to begin its first
    backward pass: ``W(s-1) = ceil(r(s) (W(s) + 1) / r(s-1)) + slack``. A straight pipeline without
    slack has the n - 1 - s of PipeDream (SOSP 2019, section 3.2). Slack hides transfers and rounds
    of replicas behind computing, and costs memory and staleness.

    Args:
        replicas: for each stage its number of replicas.
        slack: forward passes that each stage does beyond what it must.

    Raises:
        ValueError: if a number is too small.
    """
    if not replicas or min(replicas) < 1 or slack < 0:
        raise ValueError(
            f"replicas={tuple(replicas)}, slack={slack}; expected at least one replica of each of "
            "the stages, and a slack from 0 on."
        )
    found = [0]
    for own, following in zip(reversed(replicas[:-1]), reversed(replicas[1:]), strict=True):
        found.append(-(-following * (found[-1] + 1) // own) + slack)
    return tuple(reversed(found))


def replicas_of(num_stages: int, replicas: Sequence[int] | None) -> tuple[int, ...]:
    """The number of replicas of each stage; one each by default.

    Raises:
        ValueError: if they are given for another number of stages.
    """
    chosen = (1,) * num_stages if replicas is None else tuple(replicas)
    if len(chosen) != num_stages:
        raise ValueError(
            f"replicas={chosen} is for {len(chosen)} stages; expected one number for each of the "
            f"{num_stages}."
        )
    return chosen


def in_turns(kind: ActionKind, stage: int, microbatches: Iterable[int]) -> list[Action]:
    """One action for each of some microbatches."""
    return [Action(kind, stage, microbatch) for microbatch in microbatches]


def alternate(
    first: Sequence[Action], second: Sequence[Action], warm_up: int
) -> tuple[Action, ...]:
    """`warm_up` of the first, then one of each in turn, then the rest of the second."""
    ahead = min(warm_up, len(first))
    pairs = zip(first[ahead:], second, strict=False)
    steady = [action for pair in pairs for action in pair]
    return (*first[:ahead], *steady, *second[len(first) - ahead :])


def num_workers_of(
    name: str, num_stages: int, num_chunks: int, allowed: Sequence[int] | None = None
) -> int:
    """The number of workers for a number of stages.

    Args:
        name: of the schedule.
        num_stages: number of stages on all workers together.
        num_chunks: stages on each worker.
        allowed: the numbers of virtual stages for which the schedule is defined; all if None.

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
