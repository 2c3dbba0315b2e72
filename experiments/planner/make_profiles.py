"""Makes the profiles of this folder, from shapes alone: nothing is allocated or run.

    python experiments/planner/make_profiles.py

The rates are those that pdjax takes for a V100 in float32: 40 % of the published 15.7 TFLOP/s and
70 % of 900 GB/s.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
from models import MODELS, Row

from pdjax.profile.measure import estimate
from pdjax.profile.rates import find_rates
from pdjax.trace.layers import LayerGraph, build_graph
from pdjax.trace.random_key import taking_key

PROFILES = Path(__file__).parent / "profiles"


def trace(row: Row) -> LayerGraph:
    """The model's layers, for one minibatch."""
    batch = {
        name: jax.ShapeDtypeStruct((row.batch_size, *shape), dtype)
        for name, (shape, dtype) in row.batch.items()
    }
    given = [batch[name] for name in row.reads]
    shapes: Any = jax.eval_shape(row.module.init, jax.random.key(0), *given)
    params, state = shapes["params"], {k: v for k, v in shapes.items() if k != "params"}
    loss_fn = taking_key(row.loss_fn, bool(state))
    return build_graph(loss_fn, params, batch, jax.random.key(0), model_state=state or None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", default="v100", help="a name or a form of pdjax.profile.rates")
    parser.add_argument("--folder", type=Path, default=PROFILES)
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    print("| model | layers | examples | weights, MB | ms for both passes | made in |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, row in MODELS.items():
        start = time.perf_counter()
        profile = estimate(trace(row), find_rates(args.rates), batch_size=row.batch_size)
        profile.save(args.folder / f"{name}.json")
        cells = (
            f"{len(profile.layers)} | {row.batch_size}",
            f"{profile.total('param_bytes') / 1e6:.1f}",
            f"{profile.total('compute_s') * 1e3:.1f} | {time.perf_counter() - start:.1f} s",
        )
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
