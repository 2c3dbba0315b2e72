"""Our plans beside those of the original planner, both costed by one function.

    python experiments/planner/original.py FOLDER_OF_GRAPHS ANSWERS_JSON

FOLDER_OF_GRAPHS has the original's profiles (vgg16.txt, gnmt.txt, resnet50.txt), ANSWERS_JSON the
answers of its planner: a list of records with the fields model, setting, all_num_machines,
bandwidths, pipeline_time_s and levels_outer_first. Prints a table in Markdown.

The settings: a is 4 workers on 1 GB/s, c 8 workers on 125 MB/s, b 4 hosts of 4 workers on 10 GB/s
inside and 1.25 GB/s between. A 1, an s or an m behind it: activation traffic is charged, too; s:
nothing is replicated; m: memory was limited, to an amount that is not recorded.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from original_plans import Graph, load_graph, read_answer

from pdjax.plan.cost_model import CostForm, Costs, MemoryForm, Part
from pdjax.plan.search import fastest
from pdjax.profile.profile import Profile
from pdjax.topology.topology import Level, Topology

_SLACK = 1 + 1e-9


@dataclass(frozen=True)
class Row:
    """One answer and ours; seconds for each minibatch.

    Attributes:
        name: model and setting.
        reported_s: the time that the original reports for its plan.
        own_form_s: its plan by its own arithmetic (`in_its_form_s`).
        its_s: its plan by `Costs.plan_s`; None if it is no division of the model.
        ours_s: our plan on our line of the nodes, by the same function.
        same_line_s: our plan on a line of the nodes on which its cuts are possible.
        its: its replicas.
        ours: our replicas.
    """

    name: str
    reported_s: float
    own_form_s: float | None
    its_s: float | None
    ours_s: float
    same_line_s: float | None
    its: str
    ours: str


def compare(graph: Graph, answer: dict[str, Any]) -> Row:
    setting = answer["setting"]
    found = read_answer(graph, answer)
    ours = make_costs(graph.profile, answer)
    mine = best_parts(ours, setting)
    row = {
        "name": f"{answer['model']} {setting}",
        "reported_s": answer["pipeline_time_s"],
        "ours_s": ours.plan_s(mine),
        "ours": notation(ours, mine),
        "own_form_s": None,
        "its_s": None,
        "same_line_s": None,
        "its": "not nested",
    }
    if found.profile is not None:
        costs = make_costs(found.profile, answer)
        row |= {
            "own_form_s": in_its_form_s(costs, found.parts),
            "its_s": costs.plan_s(found.parts),
            "same_line_s": costs.plan_s(best_parts(costs, setting)),
            "its": notation(costs, found.parts),
        }
    return Row(**row)


def make_costs(profile: Profile, answer: dict[str, Any]) -> Costs:
    """The original's way to put times together: sums, and 4 (m - 1) / m bytes for an all-reduce."""
    units = zip(answer["all_num_machines"], answer["bandwidths"], strict=True)
    topology = Topology(tuple(Level(count, speed) for count, speed in units))
    charged = len(answer["setting"]) > 1
    form = CostForm(overlap=False, sync="original", activations=charged)
    return Costs(profile, topology, form, MemoryForm())


def best_parts(costs: Costs, setting: str) -> tuple[Part, ...]:
    parts = fastest(costs, replicate=not setting.endswith("s"))
    assert parts is not None, "without limits one worker can hold everything"
    return parts


def in_its_form_s(costs: Costs, parts: tuple[Part, ...], level: int | None = None) -> float:
    """The time of a plan by the original's arithmetic.

    It differs from `Costs.plan_s` in two divisions: the bytes of a cut are divided by the replicas
    of the part that receives them, and an all-reduce between hosts by the workers of a host.
    """
    level = len(costs.topology.levels) - 1 if level is None else level
    inside = 1
    for inner in costs.topology.levels[:level]:
        inside *= inner.num_units
    speed = costs.topology.levels[level].bandwidth_bytes_per_s
    slowest = 0.0
    for part in parts:
        m = part.replicas
        if part.inner:
            work = in_its_form_s(costs, part.inner, level - 1)
        else:
            work = costs.work_s(part.first, part.stop, False)
        sync = costs.cost.sync_s_per_byte(m, speed) * costs.params_of(part) / inside
        cut = costs.cut_s(part.first, level) / m if part.first > parts[0].first else 0.0
        slowest = max(slowest, (work + sync) / m, cut)
    return slowest


def notation(costs: Costs, parts: tuple[Part, ...]) -> str:
    """The replicas of all stages, long runs of 1 shortened: ``"1×4"``."""
    counts = [stage.replicas for stage in costs.stages(parts)]
    if len(counts) > 3 and set(counts) == {1}:
        return f"1×{len(counts)}"
    return "-".join(map(str, counts))


def in_ms(seconds: float | None) -> str:
    return "—" if seconds is None else f"{seconds * 1e3:.3f}"


def show(rows: list[Row]) -> None:
    print(
        "| model, setting | its plan | ours | it reported | by its arithmetic | its plan re-costed "
        "| ours | ours, its line |\n|---|---|---|---:|---:|---:|---:|---:|"
    )
    for row in rows:
        cells = (row.reported_s, row.own_form_s, row.its_s, row.ours_s, row.same_line_s)
        print(f"| {row.name} | {row.its} | {row.ours} | {' | '.join(map(in_ms, cells))} |")
    known = [row for row in rows if row.its_s is not None]
    same = sum(abs((row.own_form_s or 0) / row.reported_s - 1) < 1e-6 for row in known)
    print(f"\n{len(known)} of {len(rows)} answers are divisions of the model into nested stages;")
    print(f"its own arithmetic gives the reported time for {same} of them.")
    for title, field in (("our line", "ours_s"), ("its line", "same_line_s")):
        pairs = [(getattr(row, field), row.its_s or 0.0) for row in known]
        faster = sum(mine * _SLACK < its for mine, its in pairs)
        slower = sum(mine > its * _SLACK for mine, its in pairs)
        equal = len(pairs) - faster - slower
        print(f"On {title} ours is faster in {faster}, as fast in {equal}, slower in {slower}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graphs", type=Path, help="folder with the original's profiles")
    parser.add_argument("answers", type=Path, help="JSON file with the answers of its planner")
    args = parser.parse_args()
    answers = json.loads(args.answers.read_text())
    names = {answer["model"] for answer in answers}
    graphs = {name: load_graph((args.graphs / f"{name}.txt").read_text(), name) for name in names}
    show([compare(graphs[answer["model"]], answer) for answer in answers])


if __name__ == "__main__":
    sys.exit(main())
