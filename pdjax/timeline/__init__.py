"""What happened when: the value, and it as a picture, as text and as a Perfetto trace.

Nothing here imports JAX.
"""

from pdjax.timeline.timeline import Span as Span
from pdjax.timeline.timeline import Timeline as Timeline
