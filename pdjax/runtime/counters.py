"""What the stages of a pipeline hold at their peak."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pdjax.runtime.programs import Passes
from pdjax.runtime.state import Programs, Run
from pdjax.trace.jit import Values


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
        held_bytes: bytes that wait for the weight part of one microbatch's backward pass, from its
            input part on; 0 if backward passes are not divided.
        peak_stash_bytes: the most that the stash held and that waited for weight parts, together.
    """

    stage: int
    weight_bytes: int
    peak_versions: int
    optimizer_bytes: int
    gradient_bytes: int
    stash_bytes: int
    peak_in_flight: int
    held_bytes: int
    peak_stash_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Bytes of all versions, the optimizer state, the gradients and the stash."""
        weights = self.weight_bytes * self.peak_versions
        fixed = weights + self.optimizer_bytes + self.gradient_bytes
        return fixed + self.peak_stash_bytes


def stage_memory(passes: Programs, run: Run) -> tuple[StageMemory, ...]:
    """What each stage, and replica, of `run` has held at its peak so far.

    It is for batches that `passes` are for.
    """
    assert isinstance(passes, Passes), "programs of a training"
    return tuple(
        StageMemory(
            stage=passes.replicas.stage_of[index],
            weight_bytes=held.counters.weight_bytes,
            peak_versions=held.counters.peak_versions,
            optimizer_bytes=_bytes(held.lasting.optimizer),
            gradient_bytes=gradient_bytes(passes, run, index),
            stash_bytes=passes.stash_bytes[index] if "F" in passes.kinds[index] else 0,
            peak_in_flight=held.counters.peak_in_flight,
            held_bytes=passes.held_bytes[index],
            peak_stash_bytes=held.counters.peak_stash_bytes,
        )
        for index, held in enumerate(run.stages)
    )


def gradient_bytes(passes: Passes, run: Run, replica: int) -> int:
    """Bytes of the gradients of a replica; 0 if they are applied where they are made."""
    return 0 if "FBU" in passes.kinds[replica] else run.stages[replica].counters.weight_bytes


@dataclass(frozen=True)
class Counts:
    """What was done since `init`, counted while it was dispatched.

    Attributes:
        actions: for each stage how often it did each kind of action.
        link_bytes: bytes that each worker sent to each other one, by (source, target).
        peak_bytes: for each worker the most that it held of its stages: versions of the weights,
            optimizer state, gradients and stash.
        num_recompilations: how often programs for a batch shape were compiled again, as there were
            too many shapes to keep those of all.
    """

    actions: tuple[dict[str, int], ...]
    link_bytes: dict[tuple[int, int], int]
    peak_bytes: tuple[int, ...]
    num_recompilations: int = 0


def count(passes: Programs, run: Run, num_recompilations: int = 0) -> Counts:
    """What `run` counted so far; gradients are those of the last minibatch's programs."""
    assert isinstance(passes, Passes), "programs of a training"
    replicas = passes.replicas
    found: list[Counter[str]] = [Counter() for _ in replicas.num_replicas]
    for stage, state in zip(replicas.stage_of, run.stages, strict=True):
        for kinds, times in state.counters.performed.items():
            found[stage].update(dict.fromkeys(kinds, times))
    actions = [dict(sorted(each.items())) for each in found]
    links: Counter[tuple[int, int]] = Counter()
    for (source, target), size in run.sent_bytes.items():
        pair = replicas.worker_of[source], replicas.worker_of[target]
        if pair[0] != pair[1]:
            links[pair] += size
    peaks = []
    for worker, tally in enumerate(run.workers):
        held = [at for at, where in enumerate(replicas.worker_of) if where == worker]
        fixed = sum(_bytes(run.stages[at].lasting.optimizer) for at in held)
        fixed += sum(gradient_bytes(passes, run, at) for at in held)
        peaks.append(fixed + tally.peak_bytes)
    return Counts(tuple(actions), dict(sorted(links.items())), tuple(peaks), num_recompilations)


def _bytes(leaves: Values) -> int:
    return sum(leaf.nbytes for leaf in leaves)
