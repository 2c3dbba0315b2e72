"""Holds that processes that train together read the same data, for as long."""

from __future__ import annotations

from pdjax.distributed import Peers
from pdjax.pipeline.consistency import check_agreement
from pdjax.task import Task
from pdjax.train.config import TrainConfig

_COUNTS = ("seed", "steps", "batch_size", "eval_examples")
_REMEDY = (
    "Give all the same arguments and files; the data of 'stdlib' is the same with the same version "
    "of Python only."
)


def check_same_task(peers: Peers, config: TrainConfig, task: Task) -> None:
    """Compares with the other processes what `Pipeline` cannot see: later batches, and how many.

    Otherwise each would train its stages on what it read, and no error would tell.

    Raises:
        ValueError: if something differs; in every process, with the difference by name.
    """
    mine = {f"--{name.replace('_', '-')}": str(getattr(config, name)) for name in _COUNTS}
    mine["the size of the data"] = task.dataset.description
    mine["the data"] = f"digest {task.dataset.digest()}"
    check_agreement(peers, mine, _REMEDY)
