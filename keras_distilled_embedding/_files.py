"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO
from typing import Any


def temporary_path(path: Path) -> Path:
    """Where a file is while it is written."""
    return path.with_name(path.name + ".tmp")


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file beside `path`, then puts it in place.

    Args:
        path: Path of the file. One that is there stays as it is on a failure.
        write: Function that writes to the open binary file it is given.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
