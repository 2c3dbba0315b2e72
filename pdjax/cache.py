"""Results of measurements, kept for the next run.

A measurement takes seconds and comes out a little differently each time. So its result is kept in
this process, and, if JAX has a directory for its compilation cache (the option
`jax_compilation_cache_dir`), in a file there. The same model then gets the same plan again, and
finds its compiled programs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

_log = logging.getLogger("pdjax")

_Value = TypeVar("_Value")

_texts: dict[str, str] = {}


def cached(
    kind: str, about: Any, measure: Callable[[], str], read: Callable[[str], _Value]
) -> _Value:
    """The result of a measurement, from before if there is one.

    Args:
        kind: what is measured, such as ``"profile"``; part of the file's name.
        about: all that the result depends on, as JSON can hold it.
        measure: measures, and returns the result as text.
        read: reads the text; raises ValueError or TypeError for a text that is no result.
    """
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    if key not in _texts:
        file = _file(kind, key)
        text = _text_of(file)
        try:
            read(text)
        except (ValueError, TypeError):  # there is no file, or a crash left half of one
            text = measure()
            _write(file, text)
        _texts[key] = text
    return read(_texts[key])


def forget() -> None:
    """Forgets the results that this process keeps; the files stay."""
    _texts.clear()


def kind_of_device(device: Any) -> tuple[str, str, str]:
    """The properties of a device that decide how fast it is, with the version of JAX."""
    return device.platform, device.device_kind, jax.__version__


def _file(kind: str, key: str) -> Path | None:
    directory = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not directory or "://" in directory:  # a bucket is not ours to write to
        return None
    return Path(directory) / f"pdjax-{kind}-{key}.json"


def _text_of(file: Path | None) -> str:
    try:
        return "" if file is None else file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _write(file: Path | None, text: str) -> None:
    """Writes the whole file at once, or nothing: processes may share the directory."""
    if file is None:
        return
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        draft.replace(file)
    except OSError as error:
        _log.warning("the measurement cannot be kept for the next run: %s", error)
