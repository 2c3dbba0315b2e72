"""Profiles from files, whichever of the two forms they are in.

Nothing here imports JAX.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from pdjax.profile.graph_txt import read_graph
from pdjax.profile.profile import Profile


def load_profile(path: str | PathLike[str]) -> Profile:
    """Reads a profile that `Profile.save` wrote, or a ``graph.txt`` of the original PipeDream.

    The content tells which: JSON begins with a brace.

    Raises:
        ValueError: naming the file, if there is none or it is no profile.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the profile {path}: {error}") from None
    if text.lstrip().startswith("{"):
        return Profile.from_json(text, str(path))
    return read_graph(text, str(path))
