"""What the actions of a schedule send each other: counted from the lowered schedule.

Nothing here imports JAX.
"""

from __future__ import annotations

from pdjax.schedules.lower import Messages as Messages
from pdjax.schedules.lower import messages_between as messages_between
