"""Pipeline-parallel training of unmodified Flax models in JAX.

Names that need JAX are imported at their first use: planning and simulating work without it.

Words of the field as pdjax uses them:

- *layer*: the smallest unit that a plan may place; a run of traced equations, named by its module.
- *stage*: a run of layers that is compiled as one unit. A *cut* lies between two stages.
- *worker*: a device that runs one replica of a stage, or several stages when interleaved.
- *replica*: one of the workers that share a stage and take its microbatches in turns.
- *virtual stages*: the stages of one worker that runs several (`num_chunks`).
- *minibatch*: the examples of one step of the training loop. *Microbatch*: a slice of a minibatch,
  the unit that flows through the pipeline.
- *schedule*: for every worker the order of its actions: F forward pass, B backward pass, or its two
  parts I (gradients of the input) and W (gradients of the weights), U update.
- *flush*: a schedule that finishes every minibatch before the next one is *synchronous*; one that
  never flushes is *asynchronous*. A *drain* finishes all microbatches in flight.
- *version*: the number of updates applied to the weights of a stage so far.
- *stash*: weights and residuals kept from a forward pass to its backward pass.
- *in flight*: microbatches between their forward and their backward pass on a stage.
- *staleness*: updates between the version that a gradient was computed with and the one that it is
  applied to.
- *weight rule*: which version the passes of a microbatch read.
- *warm-up*: forward passes of a worker before its first backward pass; *slack* is more of them than
  are needed. *Update lag*: rounds by which an update waits for its all-reduce.
- *activations*: values sent forward to a later stage; *cotangents*: their gradients, sent back.
- *residuals*: values saved by a forward pass for its backward pass. *Rematerialisation* computes
  them again.
- *profile*: seconds and bytes of each layer. *Topology*: the machines and their links. *Plan*: the
  layers, the replicas and the workers of each stage.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pdjax import distributed as distributed
from pdjax.errors import BrokenPipelineError as BrokenPipelineError
from pdjax.errors import ClusterError as ClusterError
from pdjax.errors import NonFiniteLossError as NonFiniteLossError
from pdjax.errors import PdjaxWarning as PdjaxWarning
from pdjax.plan import Plan as Plan
from pdjax.plan import PlanOptions as PlanOptions
from pdjax.profile import Profile as Profile
from pdjax.schedules import ALGORITHMS as ALGORITHMS
from pdjax.schedules import Action as Action
from pdjax.schedules import Schedule as Schedule
from pdjax.schedules import ScheduleError as ScheduleError
from pdjax.schedules import gpipe as gpipe
from pdjax.schedules import model_parallel as model_parallel
from pdjax.schedules import one_f_one_b as one_f_one_b
from pdjax.schedules import pipedream as pipedream
from pdjax.schedules import validate as validate
from pdjax.schedules.weight_rule import LATEST as LATEST
from pdjax.schedules.weight_rule import STASH as STASH
from pdjax.schedules.weight_rule import WeightRule as WeightRule
from pdjax.simulate import plan_pipeline as plan_pipeline
from pdjax.timeline import Timeline as Timeline
from pdjax.topology import Topology as Topology

if TYPE_CHECKING:
    from pdjax import nnx as nnx
    from pdjax.pipeline.pipeline import Pipeline as Pipeline
    from pdjax.pipeline.state import PipelineState as PipelineState

__version__ = "0.1.0"

_NEED_JAX = {
    "Pipeline": ("pdjax.pipeline.pipeline", "Pipeline"),
    "PipelineState": ("pdjax.pipeline.state", "PipelineState"),
    "nnx": ("pdjax.nnx", None),
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_JAX:
        raise AttributeError(f"module 'pdjax' has no attribute {name!r}")
    module, attribute = _NEED_JAX[name]
    loaded = importlib.import_module(module)
    globals()[name] = value = loaded if attribute is None else getattr(loaded, attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NEED_JAX} - {"Any", "TYPE_CHECKING", "annotations", "importlib"})
