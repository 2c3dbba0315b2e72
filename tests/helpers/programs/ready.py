"""The second of two processes takes longer to get ready; the first one's `init` waits for it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import optax

sys.path.insert(0, str(Path(__file__).parents[1]))

import zoo

import pdjax
from pdjax import distributed
from pdjax.pipeline.prepared import Prepared
from pdjax.runtime.state import Run

LATE_S = 2.0

mark = Path(sys.argv[1])
peers = distributed.initialize()
start = Prepared.start


def start_late(self: Prepared, params: Any, model_state: Any) -> Run:
    run = start(self, params, model_state)
    time.sleep(LATE_S)
    mark.touch()
    return run


if peers.process_id == 1:
    Prepared.start = start_late
case = zoo.dense_blocks(num_blocks=2)
pipe = pdjax.Pipeline(
    case.loss_fn, optax.sgd(0.1), num_stages=2, num_microbatches=2, plan="balanced"
)
pipe.init(case.params, case.make_batch(8, 0))
assert mark.exists()
