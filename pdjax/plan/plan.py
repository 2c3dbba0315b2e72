"""The plan as a value.

Nothing here imports JAX.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pdjax.plan.figures import Prediction, StageFigures, Strategy
from pdjax.plan.report import describe
from pdjax.serialization import check_fields, is_amount, is_count, read_object

_MANY = 8  # stages alike that are written out
FORMAT = 1
"""Version of the JSON form."""


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
        slack: forward passes of each stage but the last beyond the smallest warm-up.
        update_lag: rounds by which the updates of replicated stages are late.
    """

    layers: tuple[str, ...]
    first_layers: tuple[int, ...]
    shares: tuple[float, ...] = ()
    model: str = ""
    stages: tuple[StageFigures, ...] = ()
    prediction: Prediction | None = None
    slack: int = 0
    update_lag: int = 0

    def __post_init__(self) -> None:
        starts = self.first_layers
        if not all(isinstance(name, str) for name in self.layers):
            raise ValueError("layers has what is no text; expected the names of the layers.")
        if not all(map(is_count, starts)):
            raise ValueError(f"first_layers is {list(starts)}; expected whole numbers.")
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
        held = [worker for stage in self.stages for worker in stage.workers]
        if len(set(held)) < len(held):
            raise ValueError(f"a worker has two stages: the stages have the workers {held}.")
        for name in ("slack", "update_lag"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number from 0 on.")
        if not all(map(is_amount, self.shares)):
            raise ValueError(f"shares is {list(self.shares)}; expected numbers from 0 to 1.")

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
        """The papers' short form: ``"15-1"`` for 15 replicas of one stage and 1 of the other.

        More than eight stages without replicas in a row are ``"1×9"``.
        """
        runs = [(each, len(list(same))) for each, same in groupby(self.replicas)]
        parts = [
            f"{each}×{count}" if count > _MANY else "-".join([str(each)] * count)
            for each, count in runs
        ]
        return "-".join(parts)

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

    def __str__(self) -> str:
        layers = [self.stage_layers(stage) for stage in range(self.num_stages)]
        lines = describe(layers, self.shares, self.stages, self.prediction)
        options = {"slack": self.slack, "update lag": self.update_lag}
        named = [f"{name} {value}" for name, value in options.items() if value]
        return "\n\n".join([lines, *([f"Run it with {' and '.join(named)}."] if named else [])])

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
        value = read_object(text, where, what="plan", version=FORMAT)
        try:
            return _from_value(value)
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


# ---------------------------------------------------------------- from JSON


def _from_value(value: dict[str, Any]) -> Plan:
    found = _fields_of(Plan, value, "plan")
    for name in ("layers", "first_layers", "shares"):
        found[name] = _tuple(found.get(name, []), name)
    found["stages"] = tuple(
        _stage(stage, f"stage {number}")
        for number, stage in enumerate(_tuple(found.get("stages", []), "stages"))
    )
    if found.get("prediction") is not None:
        found["prediction"] = _prediction(found["prediction"])
    return Plan(**found)


def _stage(value: Any, where: str) -> StageFigures:
    found = _fields_of(StageFigures, value, where)
    found["workers"] = _tuple(found["workers"], "workers")
    return StageFigures(**found)


def _prediction(value: Any) -> Prediction:
    found = _fields_of(Prediction, value, "prediction")
    found["chosen"] = Strategy(**_fields_of(Strategy, found["chosen"], "chosen"))
    found["others"] = tuple(
        Strategy(**_fields_of(Strategy, other, "others"))
        for other in _tuple(found["others"], "others")
    )
    return Prediction(**found)


def _tuple(value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r}; expected a list.")
    return tuple(value)


def _fields_of(kind: type[Any], value: Any, where: str) -> dict[str, Any]:
    check_fields(kind, value, where)
    return dict(value)
