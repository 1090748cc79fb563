"""The progress bar of longer work."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def make_progress(verbose: int | bool) -> Progress:
    """A bar that is drawn if it is wanted, and on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(
        # The console that all share remembers what the output once was.
        console=Console(),
        transient=True,
        disable=not (verbose and sys.stdout.isatty()),
    )
