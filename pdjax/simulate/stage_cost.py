"""The cost of a stage, as the simulator counts it.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pdjax.schedules.action import KINDS
from pdjax.serialization import is_amount, is_count

_PER_MICROBATCH = (
    "forward_s",
    "backward_s",
    "input_s",
    "weight_s",
    "stash_bytes",
    "held_bytes",
    "pass_bytes",
)
_AMOUNTS = (*_PER_MICROBATCH, "update_s", "param_bytes", "optimizer_bytes", "gradient_bytes")


@dataclass(frozen=True)
class StageCost:
    """The cost of a stage on one of its workers; seconds and activations for each microbatch.

    Example:
        >>> StageCost(forward_s=1.0, backward_s=2.0).weight_part_s
        1.0

    Attributes:
        forward_s: seconds of its forward pass.
        backward_s: seconds of its backward pass, with what it recomputes.
        input_s: seconds of the input part of the backward pass; half of it if None.
        weight_s: seconds of the weight part of the backward pass; half of it if None.
        update_s: seconds of an update.
        param_bytes: bytes of one version of its weights.
        optimizer_bytes: bytes of its optimizer state.
        gradient_bytes: bytes of its gradients: of the sums, and of an all-reduce of its replicas.
        stash_bytes: bytes that wait from a forward pass to the backward pass or its input part.
        held_bytes: bytes that wait from an input part to the weight part, in their place.
        pass_bytes: bytes that are needed only while a pass runs: recomputed activations, buffers.
        sends: pairs (stage, bytes): the activations that go to later stages. Those that skip stages
            are sent directly; of several, they go out in this order.
        returns: pairs (stage, bytes): the cotangents that go to earlier stages.
    """

    forward_s: float
    backward_s: float
    input_s: float | None = None
    weight_s: float | None = None
    update_s: float = 0.0
    param_bytes: float = 0
    optimizer_bytes: float = 0
    gradient_bytes: float = 0
    stash_bytes: float = 0
    held_bytes: float = 0
    pass_bytes: float = 0
    sends: tuple[tuple[int, float], ...] = ()
    returns: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in _AMOUNTS:
            amount = getattr(self, name)
            if not is_amount(amount) and not (amount is None and name in ("input_s", "weight_s")):
                raise ValueError(
                    f"{name} is {amount!r}; expected a finite number that is not negative."
                )
        for name in ("sends", "returns"):
            pairs = getattr(self, name)
            for pair in pairs:
                if len(pair) != 2 or not is_count(pair[0]) or not is_amount(pair[1]):
                    raise ValueError(
                        f"{name} has {pair!r}; expected a stage and the bytes that go to it."
                    )
            if len({stage for stage, _ in pairs}) < len(pairs):
                raise ValueError(f"{name} is {pairs!r}; expected each stage once.")

    @property
    def input_part_s(self) -> float:
        """Seconds of the input part of the backward pass."""
        return self.backward_s / 2 if self.input_s is None else self.input_s

    @property
    def weight_part_s(self) -> float:
        """Seconds of the weight part of the backward pass."""
        return self.backward_s / 2 if self.weight_s is None else self.weight_s

    @property
    def seconds(self) -> tuple[float, ...]:
        """Seconds of each kind of action, in the order of `pdjax.schedules.action.KINDS`."""
        return tuple(getattr(self, row.cost) for row in KINDS.values())

    def scaled(self, factor: float) -> StageCost:
        """The cost of microbatches `factor` times as large, by simple proportion.

        Seconds of passes and bytes of activations grow with the microbatch; updates, weights and
        optimizer state do not.
        """
        if factor == 1:
            return self
        amounts = {name: getattr(self, name) for name in _PER_MICROBATCH}
        return replace(
            self,
            **{name: each if each is None else each * factor for name, each in amounts.items()},
            sends=tuple((stage, size * factor) for stage, size in self.sends),
            returns=tuple((stage, size * factor) for stage, size in self.returns),
        )


def check_costs(costs: Sequence[StageCost], num_stages: int) -> None:
    """Raises ValueError unless there is a cost for each stage, and all send the right way."""
    if len(costs) != num_stages:
        raise ValueError(
            f"got the costs of {len(costs)} stages for a schedule of {num_stages}; expected one "
            "StageCost for each stage."
        )
    for stage, cost in enumerate(costs):
        for target, _ in cost.sends:
            if not stage < target < num_stages:
                raise ValueError(
                    f"stage {stage} of {num_stages} sends activations to stage {target}; expected "
                    "a later stage."
                )
        for target, _ in cost.returns:
            if not target < stage:
                raise ValueError(
                    f"stage {stage} returns cotangents to stage {target}; expected an earlier one."
                )
