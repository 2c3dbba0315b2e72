"""The formulas of the guide, compared with simulations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cases import STASH_BYTES, Case


@dataclass(frozen=True)
class Setting:
    """What a formula is about.

    Attributes:
        n: workers.
        m: microbatches in a minibatch.
        v: stages on each worker.
        f: seconds of the forward pass, of all stages of a worker together.
        i: seconds of the input part of the backward pass.
        w: seconds of its weight part.
    """

    n: int
    m: int
    v: int = 1
    f: float = 1.0
    i: float = 1.0
    w: float = 1.0

    @property
    def b(self) -> float:
        """Seconds of the backward pass."""
        return self.i + self.w

    def case(self, name: str) -> Case:
        chunks = self.v if name == "interleaved" else None
        return Case.of(name, self.m, self.n, chunks, (self.f, self.i, self.w))


@dataclass(frozen=True)
class Form:
    """A formula, and the cases that it is claimed for.

    Attributes:
        name: of the schedule.
        text: the formula for people.
        where: the cases that it is claimed for, for people.
        value: the formula.
        holds: whether it is claimed for a case.
    """

    name: str
    text: str
    where: str
    value: Callable[[Setting], float | list[float]]
    holds: Callable[[Setting], bool] = lambda s: True


WAITS = (
    Form("model_parallel", "m (n − 1)(f + b)", "always", lambda s: s.m * (s.n - 1) * (s.f + s.b)),
    Form("gpipe", "(n − 1)(f + b)", "always", lambda s: (s.n - 1) * (s.f + s.b)),
    Form("one_f_one_b", "(n − 1)(f + b)", "always", lambda s: (s.n - 1) * (s.f + s.b)),
    Form(
        "interleaved",
        "(n − 1)(f + b) / v",
        "m ≥ n",
        lambda s: (s.n - 1) * (s.f + s.b) / s.v,
        lambda s: s.m >= s.n,
    ),
    Form(
        "zero_bubble_h1",
        "(n − 1)(f + i − w)",
        "m ≥ n, w ≤ f, w ≤ i",
        lambda s: (s.n - 1) * (s.f + s.i - s.w),
        lambda s: s.m >= s.n and s.w <= min(s.f, s.i),
    ),
    Form(
        "zero_bubble_v",
        "(n − 1) f / 2",
        "m ≥ 2n − 1, f = i = w",
        lambda s: (s.n - 1) * s.f / 2,
        lambda s: s.m >= 2 * s.n - 1 and s.f == s.i == s.w,
    ),
)
"""How long each worker waits in one minibatch by itself, in seconds."""

IN_FLIGHT = (
    Form("model_parallel", "1", "always", lambda s: [1.0] * s.n),
    Form("gpipe", "m", "always", lambda s: [float(s.m)] * s.n),
    Form(
        "one_f_one_b",
        "min(n − k, m)",
        "always",
        lambda s: [float(min(s.n - k, s.m)) for k in range(s.n)],
    ),
    Form(
        "interleaved",
        "min(((v + 1) n − 1 − 2k) / v, m)",
        "n divides m",
        lambda s: [min(((s.v + 1) * s.n - 1 - 2 * k) / s.v, s.m) for k in range(s.n)],
        lambda s: s.m % s.n == 0,
    ),
    Form("zero_bubble_h1", "min(n, m)", "always", lambda s: [float(min(s.n, s.m))] * s.n),
    Form(
        "zero_bubble_v",
        "n",
        "m ≥ 2n − 1",
        lambda s: [float(s.n)] * s.n,
        lambda s: s.m >= 2 * s.n - 1,
    ),
)
"""The stash of worker k at its peak, in microbatches of a whole worker."""


def waits(form: Form, setting: Setting) -> bool:
    """Whether the simulator finds that workers wait as long as a formula says."""
    case = setting.case(form.name)
    expected_s = case.alone_s + _single(form.value(setting))
    return math.isclose(case.timeline().makespan_s, expected_s, rel_tol=1e-9)


def stashes(form: Form, setting: Setting) -> bool:
    """Whether the simulator finds the peaks of a formula."""
    expected, found = form.value(setting), in_flight(setting.case(form.name))
    assert isinstance(expected, list)
    return all(
        math.isclose(each, other, rel_tol=1e-6)  # bytes are whole
        for each, other in zip(expected, found, strict=True)
    )


def _single(value: float | list[float]) -> float:
    assert not isinstance(value, list)
    return value


def in_flight(case: Case) -> list[float]:
    """The largest stash of each worker, in microbatches of a whole worker."""
    peaks = [0] * case.num_workers
    for held in case.timeline(times=4).memory:
        peaks[held.worker] = max(peaks[held.worker], held.stash_bytes)
    return [peak / STASH_BYTES for peak in peaks]


def settings_of(form: Form, seconds: tuple[float, ...]) -> Iterator[Setting]:
    """All settings in which a formula is looked at, passes taking one of some seconds each."""
    chunks = {"interleaved": (2, 3, 4), "zero_bubble_v": (2,)}.get(form.name, (1,))
    for n in (1, 2, 3, 4, 6):
        for m in (1, 2, 3, 4, 5, 6, 8, 12):
            for v in chunks:
                every = (
                    Setting(n, m, v, f, i, w) for f in seconds for i in seconds for w in seconds
                )
                yield from filter(form.holds, every)
