"""What the commands share: arguments become a configuration, and errors a line and an exit code.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from rich.console import Console

_Config = TypeVar("_Config")


def run_command(
    name: str,
    config_type: type[_Config],
    act: Callable[[_Config, Console], Any],
    arguments: Sequence[str] | None,
    *,
    wraps: bool = False,
) -> int:
    """Runs a command; returns the exit code: 2 for arguments that make no sense.

    Args:
        name: what stands behind ``python -m``.
        config_type: the dataclass that the arguments describe.
        act: what is done with it. ValueError and OSError are reported as its user's.
        arguments: of the command line; those of this process if None.
        wraps: whether lines that are wider than the terminal are broken.
    """
    config = tyro.cli(config_type, args=arguments, prog=f"python -m {name}")
    try:
        act(config, Console(highlight=False, soft_wrap=not wraps))
    except (ValueError, OSError) as error:
        print_error(f"error: {error}")
        return 2
    return 0


def print_error(text: str) -> None:
    """Prints a line in red where errors go."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    errors.print(text, style="red", markup=False)
