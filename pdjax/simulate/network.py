"""The link that a message takes from one worker to another.

Every unit of a level of a topology has one link out, on which one message travels at a time;
incoming messages do not disturb it. A message takes the link of the innermost level that joins both
workers. Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, zip_longest
from typing import NamedTuple

import numpy as np

from pdjax.topology.topology import Topology


class Links(NamedTuple):
    """The links that messages take.

    Attributes:
        link: for each message the number of its link.
        bytes_per_s: the bandwidth of that link.
    """

    link: np.ndarray
    bytes_per_s: np.ndarray


def find_links(topology: Topology, source: np.ndarray, target: np.ndarray) -> Links:
    """The links from workers of a topology to others; no worker to itself."""
    level = np.zeros(len(source), np.int64)
    sizes = unit_sizes(topology)
    for size in sizes[1:]:
        level += source // size != target // size
    first = np.concatenate([[0], np.cumsum(topology.num_workers // sizes)])
    speeds = np.array([each.bandwidth_bytes_per_s for each in topology.levels])
    return Links(first[level] + source // sizes[level], speeds[level])


def unit_sizes(topology: Topology) -> np.ndarray:
    """For each level how many workers one of its units has."""
    units = [level.num_units for level in topology.levels]
    return np.concatenate([[1], np.cumprod(units[:-1], dtype=np.int64)])


def in_turns_over_units(workers: Sequence[int], topology: Topology | None) -> list[int]:
    """The workers of a stage in the order in which they take microbatches.

    Where they are in several outer units, these take turns, and inside of each its inner ones: so
    all stages of a nested plan have a microbatch in the same unit.

    Args:
        workers: their numbers in the topology.
        topology: the machines; if None, the workers are taken in ascending order.
    """
    sizes = [1] if topology is None else unit_sizes(topology).tolist()
    return _in_turns(sorted(workers), sizes)


def _in_turns(workers: list[int], sizes: list[int]) -> list[int]:
    if len(sizes) == 1:
        return workers
    units = [list(unit) for _, unit in groupby(workers, lambda worker: worker // sizes[-1])]
    every = zip_longest(*(_in_turns(unit, sizes[:-1]) for unit in units))
    return [worker for turn in every for worker in turn if worker is not None]


def check_workers(
    workers: Sequence[int] | None, num_workers: int, topology: Topology | None
) -> np.ndarray:
    """For each worker of a schedule its number in the topology: the same by default.

    Raises:
        ValueError: if they are not as many different workers of the topology.
    """
    chosen = list(range(num_workers)) if workers is None else list(workers)
    if len(chosen) != num_workers or len(set(chosen)) < num_workers:
        raise ValueError(
            f"workers={chosen}; expected a different number for each of the {num_workers} workers "
            "of the schedule."
        )
    if topology is not None and not all(0 <= each < topology.num_workers for each in chosen):
        raise ValueError(
            f"the schedule runs on the workers {chosen}, but the topology {topology} has "
            f"{topology.num_workers}. Use a larger topology, or a schedule for fewer workers."
        )
    return np.array(chosen, np.int64)
