"""Schedules without devices: the times, the transfers and the memory of a run.

`simulate` makes a `pdjax.timeline.Timeline` of a schedule and the costs of its stages; `compare`
simulates all schedules for a plan, and `choose` takes the best. Nothing here imports JAX.
"""

from pdjax.simulate.comparison import Comparison as Comparison
from pdjax.simulate.comparison import Outcome as Outcome
from pdjax.simulate.comparison import choose as choose
from pdjax.simulate.comparison import compare as compare
from pdjax.simulate.costing import stage_costs as stage_costs
from pdjax.simulate.memory import peak_bytes as peak_bytes
from pdjax.simulate.simulation import simulate as simulate
from pdjax.simulate.stage_cost import StageCost as StageCost
from pdjax.simulate.steady_state import staleness as staleness
from pdjax.simulate.steady_state import steady_s as steady_s
from pdjax.simulate.tuned_plan import plan_pipeline as plan_pipeline
