"""Plans: which layers make up which stage, on which workers.

`plan_pipeline` finds the fastest one that fits. Nothing here imports JAX.
"""

from pdjax.planner.cuts import balanced_plan as balanced_plan
from pdjax.planner.cuts import manual_plan as manual_plan
from pdjax.planner.plan import Plan as Plan
from pdjax.planner.plan import Prediction as Prediction
from pdjax.planner.plan import StageFigures as StageFigures
from pdjax.planner.plan import Strategy as Strategy
from pdjax.planner.planning import PlanOptions as PlanOptions
from pdjax.planner.planning import plan_pipeline as plan_pipeline
