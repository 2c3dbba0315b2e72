"""Schedules without devices: what happens when, what is sent, what is held.

`simulate` makes a `pdjax.timeline.Timeline` of a schedule and of what its stages cost; `compare`
simulates all schedules for a plan, and `choose` takes the best. Nothing here imports JAX.
"""

from pdjax.simulator.comparing import Comparison as Comparison
from pdjax.simulator.comparing import Outcome as Outcome
from pdjax.simulator.comparing import choose as choose
from pdjax.simulator.comparing import compare as compare
from pdjax.simulator.costing import stage_costs as stage_costs
from pdjax.simulator.holding import peak_bytes as peak_bytes
from pdjax.simulator.simulating import simulate as simulate
from pdjax.simulator.stage_cost import StageCost as StageCost
from pdjax.simulator.steady import staleness as staleness
from pdjax.simulator.steady import steady_s as steady_s
