"""The exceptions and warnings of pdjax that are not a plain `ValueError`."""

from __future__ import annotations


class PdjaxWarning(UserWarning):
    """Something works, but not as well as it could; the text says what to change."""


class BrokenPipelineError(RuntimeError):
    """A stage failed while it ran; the text holds the stage's own error."""


class NonFiniteLossError(FloatingPointError):
    """The loss of a training step became NaN or infinite; the text names the step."""


class ClusterError(RuntimeError):
    """The processes of a run did not come together, disagree, or have parted; the text says why."""
