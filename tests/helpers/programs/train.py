"""Runs a group of `helpers/trainings.py` as one of several processes, and writes what came out.

    python train.py GROUP FOLDER [put]

With `put` arrays travel by `jax.device_put`, for which something stands in.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import stand_in
import trainings

from pdjax import distributed

name_of_group, folder, *by_put = sys.argv[1:]
group = trainings.GROUPS[name_of_group]
jax.config.update("jax_num_cpu_devices", group.num_devices)
jax.config.update("jax_enable_x64", True)
peers = distributed.initialize()
process_id = peers.process_id
if by_put:
    stand_in.install(peers)
for name, training in group.trainings.items():
    found: Any = trainings.run(training)
    np.savez(Path(folder) / f"{name}-{process_id}.npz", **found)
assert bool(by_put) == all(stand_in.calls[kind] for kind in ("sent", "received"))
