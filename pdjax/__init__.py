"""Pipeline-parallel training of unmodified Flax models in JAX."""

from pdjax import distributed as distributed
from pdjax import nnx as nnx
from pdjax.errors import BrokenPipelineError as BrokenPipelineError
from pdjax.errors import ClusterError as ClusterError
from pdjax.errors import NonFiniteLossError as NonFiniteLossError
from pdjax.errors import PdjaxWarning as PdjaxWarning
from pdjax.pipeline.pipeline import Pipeline as Pipeline
from pdjax.pipeline.state import PipelineState as PipelineState
from pdjax.plan import Plan as Plan
from pdjax.plan import PlanOptions as PlanOptions
from pdjax.plan import plan_pipeline as plan_pipeline
from pdjax.profile.profile import Profile as Profile
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
from pdjax.timeline.timeline import Timeline as Timeline
from pdjax.topology.topology import Topology as Topology

__version__ = "0.1.0"
