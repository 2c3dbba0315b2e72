"""What the stages of a pipeline hold at their peak."""

from __future__ import annotations

from dataclasses import dataclass

from pdjax.runtime.executor import Run
from pdjax.runtime.passes import Passes
from pdjax.runtime.placed import Values


@dataclass(frozen=True)
class StageMemory:
    """What one stage holds at its peak, but for batches and values on their way between stages.

    Attributes:
        stage: the stage.
        weight_bytes: bytes of one version of its weights.
        peak_versions: the most versions alive at once.
        optimizer_bytes: bytes of its part of the optimizer state.
        gradient_bytes: bytes of its gradients; 0 if they are applied where they are made.
        stash_bytes: bytes that the stash keeps for one microbatch in flight; 0 if both passes are
            one program.
        peak_in_flight: the most microbatches in flight at once.
    """

    stage: int
    weight_bytes: int
    peak_versions: int
    optimizer_bytes: int
    gradient_bytes: int
    stash_bytes: int
    peak_in_flight: int

    @property
    def peak_bytes(self) -> int:
        """Bytes of all versions, the optimizer state, the gradients and the stash."""
        weights = self.weight_bytes * self.peak_versions
        fixed = weights + self.optimizer_bytes + self.gradient_bytes
        return fixed + self.stash_bytes * self.peak_in_flight


def stage_memory(passes: Passes, run: Run) -> tuple[StageMemory, ...]:
    """What each stage of `run` has held at its peak so far, for batches that `passes` are for."""
    kinds = [
        {kind for kind, stage, _ in passes.instructions if stage == index}
        for index in range(len(run.stages))
    ]
    return tuple(
        StageMemory(
            stage=index,
            weight_bytes=_bytes(held.weights),
            peak_versions=held.peak_versions,
            optimizer_bytes=_bytes(held.optimizer),
            gradient_bytes=0 if "FBU" in kinds[index] else _bytes(held.weights),
            stash_bytes=runner.programs.saved_bytes if "F" in kinds[index] else 0,
            peak_in_flight=held.peak_in_flight,
        )
        for index, (held, runner) in enumerate(zip(run.stages, passes.stages, strict=True))
    )


def _bytes(leaves: Values) -> int:
    return sum(leaf.nbytes for leaf in leaves)
