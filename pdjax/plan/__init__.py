"""Plans: which layers make up which stage, on which workers.

`search_plan` finds the one with the highest steady-state throughput that fits. Nothing here imports
JAX.
"""

from pdjax.plan.balance import balanced_plan as balanced_plan
from pdjax.plan.balance import manual_plan as manual_plan
from pdjax.plan.figures import Prediction as Prediction
from pdjax.plan.figures import StageFigures as StageFigures
from pdjax.plan.figures import Strategy as Strategy
from pdjax.plan.plan import Plan as Plan
from pdjax.plan.planner import PlanOptions as PlanOptions
from pdjax.plan.planner import search_plan as search_plan
