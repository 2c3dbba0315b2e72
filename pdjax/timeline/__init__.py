"""Timelines: the actions of workers in time, as a value, picture, text and Perfetto trace.

Nothing here imports JAX.
"""

from pdjax.timeline.timeline import Span as Span
from pdjax.timeline.timeline import Timeline as Timeline
