"""The plan as a value.

Nothing here imports JAX.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pdjax.planner.table import describe

FORMAT = 1
"""Version of the JSON form."""


@dataclass(frozen=True)
class StageFigures:
    """What a stage is predicted to take; seconds and bytes for each microbatch.

    Attributes:
        workers: the workers that hold a replica of it, by number, in topology order.
        warm_up: forward passes of each worker before its first backward pass.
        remat: ``"full"`` if its backward pass repeats the forward pass, to save memory.
        compute_s: seconds that one worker computes for a microbatch.
        stage_s: seconds for each microbatch of all its workers together, with their all-reduce.
        param_bytes: bytes of one version of its weights.
        stash_bytes: bytes that wait for the backward pass, for each microbatch in flight.
        in_flight: the most microbatches in flight on each worker.
        peak_bytes: the most that each worker holds: versions of the weights, gradients, optimizer
            state, the stash, buffers.
        limit_bytes: memory of its smallest worker; None if unlimited.
        wire_bytes: bytes that each worker sends for each microbatch of the whole plan.
    """

    workers: tuple[int, ...]
    warm_up: int
    remat: Literal["none", "full"]
    compute_s: float
    stage_s: float
    param_bytes: float
    stash_bytes: float
    in_flight: int
    peak_bytes: float
    limit_bytes: float | None
    wire_bytes: float


@dataclass(frozen=True)
class Strategy:
    """What one way to train is predicted to take.

    Attributes:
        name: such as ``"data parallelism"``.
        workers: how many workers it uses.
        microbatch_s: seconds for each microbatch, fills and drains of the pipeline included.
        wire_bytes: bytes that all workers together send for each microbatch.
        peak_bytes: the most that a worker holds.
        fits: whether every worker has that much.
    """

    name: str
    workers: int
    microbatch_s: float
    wire_bytes: float
    peak_bytes: float
    fits: bool

    def renamed(self, name: str) -> Strategy:
        """The same under another name."""
        return replace(self, name=name)


@dataclass(frozen=True)
class Prediction:
    """What is predicted for a plan, beside other ways to train.

    Attributes:
        schedule: name of the algorithm.
        topology: the machines, in their text form.
        source: where the layers' figures come from: ``"measured"``, ``"analytic"``,
            ``"imported"``.
        num_microbatches: microbatches in a minibatch.
        batch_size: examples in a microbatch; None if unknown.
        chosen: the plan itself.
        others: other ways to train on the same machines.
        advice: what to do, in a sentence.
    """

    schedule: str
    topology: str
    source: str
    num_microbatches: int
    batch_size: int | None
    chosen: Strategy
    others: tuple[Strategy, ...]
    advice: str

    @property
    def minibatch_s(self) -> float:
        """Predicted seconds for each minibatch."""
        return self.chosen.microbatch_s * self.num_microbatches

    @property
    def examples_per_s(self) -> float | None:
        """Predicted throughput; None if the batch size is unknown."""
        return None if self.batch_size is None else self.batch_size / self.chosen.microbatch_s


@dataclass(frozen=True)
class Plan:
    """Which layers make up which stage, on which workers.

    ``print(plan)`` shows it as a table.

    Attributes:
        layers: the names of all layers, in order.
        first_layers: for each stage the index of its first layer; the first is 0.
        shares: for each stage its share of the work, if known.
        model: fingerprint of the model that it was made for; "" if unknown.
        stages: what is predicted for each stage; empty if nothing is.
        prediction: what is predicted for the whole, or None.
    """

    layers: tuple[str, ...]
    first_layers: tuple[int, ...]
    shares: tuple[float, ...] = ()
    model: str = ""
    stages: tuple[StageFigures, ...] = ()
    prediction: Prediction | None = None

    def __post_init__(self) -> None:
        starts = self.first_layers
        ascending = all(a < b for a, b in pairwise(starts))
        if not starts or starts[0] != 0 or not ascending or starts[-1] >= len(self.layers):
            raise ValueError(
                f"stages begin at layers {list(starts)} of {len(self.layers)}; expected ascending "
                "indices of layers, the first of them 0."
            )
        for name, given in (("shares", self.shares), ("stages", self.stages)):
            if given and len(given) != len(starts):
                raise ValueError(
                    f"{len(given)} {name} for {len(starts)} stages; expected one for each, or none."
                )

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.first_layers)

    @property
    def replicas(self) -> tuple[int, ...]:
        """For each stage the number of its workers; 1 where nothing else was planned."""
        return tuple(len(stage.workers) for stage in self.stages) or (1,) * self.num_stages

    @property
    def notation(self) -> str:
        """The papers' short form: ``"15-1"`` for 15 replicas of one stage and 1 of the other."""
        return "-".join(map(str, self.replicas))

    @property
    def remat(self) -> tuple[Literal["none", "full"], ...]:
        """For each stage what its backward pass repeats."""
        return tuple(stage.remat for stage in self.stages) or ("none",) * self.num_stages

    def stage_layers(self, stage: int) -> tuple[str, ...]:
        """The names of the layers of `stage`."""
        bounds = [*self.first_layers, len(self.layers)]
        return self.layers[bounds[stage] : bounds[stage + 1]]

    def first_layers_in(self, names: Sequence[str]) -> tuple[int, ...]:
        """Where the stages begin in another line of layers, such as that of an evaluation.

        A layer of the same name stays on its stage; one that the plan does not know stays with
        the layer before it. A stage may come out empty: it then begins where the next one does.
        """
        stage_of = {name: s for s in range(self.num_stages) for name in self.stage_layers(s)}
        stages, stage = [], 0
        for name in names:
            stage = max(stage, stage_of.get(name, stage))
            stages.append(stage)
        return tuple(
            next((at for at, found in enumerate(stages) if found >= wanted), len(names))
            for wanted in range(self.num_stages)
        )

    def with_prediction(self, prediction: Prediction) -> Plan:
        """The plan with what is predicted for it."""
        return replace(self, prediction=prediction)

    def __str__(self) -> str:
        return describe(self)

    # -------- files

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Reads what `to_json` wrote.

        Args:
            text: the JSON text.
            where: the name of its file, for errors.

        Raises:
            ValueError: if it is no plan, or was written by another version of pdjax.
        """
        try:
            value: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}, line {error.lineno}: {error.msg}.") from None
        if not isinstance(value, dict) or "first_layers" not in value:
            raise ValueError(f"{where}: no plan: it has no 'first_layers'.")
        if value.pop("format", None) != FORMAT:
            raise ValueError(f"{where}: expected format {FORMAT}; make the plan anew.")
        try:
            return _from_value(value)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{where}: no plan: {error}.") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the plan to a JSON file."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Reads a plan from a JSON file.

        Raises:
            ValueError: if there is no such file, or it holds no plan.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"cannot read the plan {str(path)!r}: {error}. A plan is written by "
                "'python -m pdjax.plan … --output plan.json'."
            ) from None
        return cls.from_json(text, str(path))


def _from_value(value: dict[str, Any]) -> Plan:
    stages = tuple(
        StageFigures(**{**stage, "workers": tuple(stage["workers"])})
        for stage in value.pop("stages", ())
    )
    prediction = value.pop("prediction", None)
    if prediction is not None:
        chosen = Strategy(**prediction.pop("chosen"))
        others = tuple(Strategy(**other) for other in prediction.pop("others"))
        prediction = Prediction(**prediction, chosen=chosen, others=others)
    model = value.pop("model", "")
    fields = {name: tuple(item) for name, item in value.items()}
    return Plan(**fields, model=model, stages=stages, prediction=prediction)
