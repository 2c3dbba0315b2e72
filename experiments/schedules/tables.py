"""The figures of the guide, all of them simulated.

    python experiments/schedules/tables.py

Prints the tables of guide.md in Markdown: the schedules side by side, on links of several speeds,
with several numbers of microbatches, with several slacks, with random stages, and the number of
cases that the formulas were compared with.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from cases import FORWARD_S, MIB, NUM_WORKERS, Case, links
from closed_forms import IN_FLIGHT, WAITS, Form, Setting, in_flight, settings_of, stashes, waits

from pdjax.schedules import ALGORITHMS
from pdjax.simulate import StageCost, simulate

TRANSFERS_MS = (0.0, 0.25, 0.5, 1.0, 1.5)
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
SPREADS = (2.0, 10.0)  # the most that a random pass differs from 1 ms, as a factor
NUM_RANDOM = 200


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """A table whose first columns are texts and whose others are figures."""
    ruler = "|" + "---|" * texts + "---:|" * (len(head) - texts)
    return [f"| {' | '.join(head)} |", ruler, *(f"| {' | '.join(row)} |" for row in rows)]


def side_by_side() -> list[str]:
    head = ["schedule", "one minibatch", "each further one", "in flight", "versions"]
    head += ["weights and stash, MiB", "staleness", "sent, MiB"]
    rows = []
    for name in ALGORITHMS:
        case = Case.of(name)
        rows.append(
            [
                f"`{name}`",
                time_and_bubble(case, case.timeline().makespan_s),
                time_and_bubble(case, case.further_s()),
                numbers(in_flight(case)),
                numbers(versions(case)),
                numbers([peak / MIB for peak in case.peak_bytes]),
                numbers(case.staleness),
                f"{case.sent_bytes / MIB:.0f}",
            ]
        )
    return markdown(head, rows)


def time_and_bubble(case: Case, seconds: float) -> str:
    return f"{ms(seconds)}, {case.bubble_of(seconds):.1%}"


def slow_links() -> list[str]:
    head = ["a transfer takes …", *(ms(each * 1e-3) for each in TRANSFERS_MS)]
    rows = []
    for name in ALGORITHMS:
        if name != "pipedream_vertical_sync":  # the same order as pipedream
            rows.append([f"`{name}`", *_over_links(Case.of(name))])
    for name in ("one_f_one_b", "pipedream"):
        for slack in (1, 2):
            rows.append([f"`{name}`, slack={slack}", *_over_links(Case.of(name, slack=slack))])
    return markdown(head, rows)


def _over_links(case: Case) -> Iterator[str]:
    for each in TRANSFERS_MS:
        yield f"{case.further_s(links(each * 1e-3)) * 1e3:.4g}"


def few_microbatches() -> list[str]:
    rows = []
    for name, algorithm in ALGORITHMS.items():
        if algorithm.divides:
            rows.append([f"`{name}`", *(bubble(name, count) for count in MICROBATCHES)])
    return markdown(["microbatches in a minibatch", *map(str, MICROBATCHES)], rows)


def bubble(name: str, num_microbatches: int) -> str:
    """The bubble of a schedule; a stroke if there is none for so few microbatches."""
    try:
        case = Case.of(name, num_microbatches)
        return f"{case.bubble_of(case.further_s()):.1%}"
    except ValueError:
        return "—"


def slack() -> list[str]:
    head = ["slack", "in flight", "versions", "staleness", "weights and stash, MiB"]
    rows = []
    for each in (0, 1, 2):
        case = Case.of("pipedream", slack=each)
        cells = in_flight(case), versions(case), case.staleness, [p / MIB for p in case.peak_bytes]
        rows.append([str(each), *map(numbers, cells)])
    return markdown(head, rows)


# -------- the memory of workers


def versions(case: Case) -> list[float]:
    """The most versions of the weights that each worker holds at once."""
    timeline = case.timeline(times=4)
    one = {held.worker: held.version_bytes for held in timeline.memory if not held.time_s}
    peaks = dict(one)
    for held in timeline.memory:
        peaks[held.worker] = max(peaks[held.worker], held.version_bytes)
    return [peaks[worker] / one[worker] for worker in range(case.num_workers)]


# -------- the closed forms


def compared(
    what: str,
    forms: Sequence[Form],
    agrees: Callable[[Form, Setting], bool],
    seconds: tuple[float, ...],
) -> list[str]:
    """How many simulations agree with formulas."""
    rows = []
    for form in forms:
        found = [agrees(form, setting) for setting in settings_of(form, seconds)]
        counts = str(len(found)), str(len(found) - sum(found))
        rows.append([f"`{form.name}`", form.text, form.where, *counts])
    return markdown(["schedule", what, "where", "simulated", "differ"], rows, texts=3)


# -------- unequal stages


def unequal_stages() -> list[str]:
    """How often ZB-H1 is slower than 1F1B if every pass has a random length."""
    rows = []
    for spread in SPREADS:
        ratios = [_ratio(random.Random(seed), spread) for seed in range(NUM_RANDOM)]
        slower = [ratio for ratio in ratios if ratio > 1 + 1e-9]
        lengths = f"{1 / spread:.4g} to {spread:.4g} ms"
        rows.append([lengths, str(NUM_RANDOM), str(len(slower)), f"{max(ratios):.2f}"])
    head = ["each pass takes …", "simulated", "slower than 1F1B", "longest, of 1F1B's time"]
    return markdown(head, rows)


def _ratio(draw: random.Random, spread: float) -> float:
    """The time of a minibatch under ZB-H1 over that under 1F1B, for stages drawn at random."""
    num_stages, num_microbatches = draw.randint(2, 6), draw.randint(1, 12)
    costs = []
    for _ in range(num_stages):
        forward_s, input_s, weight_s = (1e-3 * spread ** draw.uniform(-1, 1) for _ in range(3))
        backward_s = input_s + weight_s
        costs.append(StageCost(forward_s, backward_s, input_s=input_s, weight_s=weight_s))
    h1, base = (
        simulate(ALGORITHMS[name].make(num_stages, num_microbatches, None), costs).makespan_s
        for name in ("zero_bubble_h1", "one_f_one_b")
    )
    return h1 / base


# -------- texts


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def numbers(values: Sequence[float]) -> str:
    """One number if all workers have the same, else one for each."""
    texts = [f"{value:.4g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


TABLES: dict[str, Callable[[], list[str]]] = {
    "Side by side": side_by_side,
    "Slow links: each further minibatch, in ms": slow_links,
    "Few microbatches: bubble of each further minibatch": few_microbatches,
    "Slack under pipedream": slack,
    "How long each worker waits in one minibatch": partial(
        compared, "a worker waits", WAITS, waits, (1.0, 2.5)
    ),
    "ZB-H1 beside 1F1B with unequal stages": unequal_stages,
    "How much is in flight": partial(compared, "on worker k", IN_FLIGHT, stashes, (1.0,)),
}


def main() -> None:
    print(f"{NUM_WORKERS} workers; F = I = W = {ms(FORWARD_S)} for each worker and microbatch")
    for title, table in TABLES.items():
        print(f"\n{title}\n")
        print("\n".join(table()))


if __name__ == "__main__":
    sys.exit(main())
