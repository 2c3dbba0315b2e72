"""Trains parameters that functions make as one of several processes, and writes what came out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import trainings

from pdjax import distributed

process_id = distributed.initialize().process_id
found: Any = trainings.run_made("functions")
np.savez(Path(sys.argv[1]) / f"{process_id}.npz", **found)
