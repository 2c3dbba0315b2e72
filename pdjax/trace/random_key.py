"""Loss functions that take a random key, and those that take none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_KEY_NAMES = frozenset(
    {"rng", "rngs", "key", "prng", "rng_key", "prng_key", "random_key", "dropout_key"}
)


def taking_key(loss_fn: Callable[..., Any], stateful: bool) -> Callable[..., Any]:
    """`loss_fn` as a function whose last positional argument is a random key, if it takes none.

    It takes one if its third argument (with mutable state the fourth) has no default, or has the
    name of a key (`rng`, `key`, `dropout_rng` and the like), or if it takes such a one by name
    only.
    """
    before = 2 + stateful
    try:
        parameters = list(inspect.signature(loss_fn).parameters.values())
    except (TypeError, ValueError):
        return loss_fn
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(by_position) < before or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return loss_fn
    if len(by_position) > before:
        last = by_position[before]
        if last.default is last.empty or _names_key(last.name):
            return loss_fn
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and _names_key(parameter.name):
            name = parameter.name
            return lambda *arguments: loss_fn(*arguments[:-1], **{name: arguments[-1]})
    return lambda *arguments: loss_fn(*arguments[:-1])


def _names_key(name: str) -> bool:
    return name in _KEY_NAMES or name.endswith("_rng")
