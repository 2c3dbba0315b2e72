"""Values as JSON: what the files of profiles and plans have in common.

Nothing here imports JAX.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any


def read_object(text: str, where: str, *, what: str, version: int) -> dict[str, Any]:
    """Reads a JSON object that says which version of its form it is in.

    Args:
        text: the JSON text.
        where: the name of its file, for errors.
        what: what it should be: ``"plan"``.
        version: the version that is understood.

    Raises:
        ValueError: naming the file, and the line if it is no JSON.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {error.lineno}: {error.msg}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: no {what}, but {str(value)[:40]!r}.")
    if value.pop("format", None) != version:
        raise ValueError(f"{where}: expected format {version}; make the {what} anew.")
    return value


def check_fields(kind: type[Any], value: Any, where: str) -> None:
    """Raises ValueError unless `value` has the fields that `kind` needs and no others."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {value!r}; expected the fields of a {kind.__name__}.")
    known = [field.name for field in fields(kind)]
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in value]
    unknown = [name for name in value if name not in known]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}.")
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(known)}.")


def is_amount(value: Any) -> bool:
    """Whether `value` is a finite number that is not negative."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and 0 <= float(value) < math.inf


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number that is not negative."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0
