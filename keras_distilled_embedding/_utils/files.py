"""Writing files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO
from typing import Any


def check_destination(argument: str, path: Path) -> None:
    """Raises an error, before any work, if no file can be written to `path`."""
    received = f"Received: {argument}={str(path)!r}"
    if path.is_dir():
        raise IsADirectoryError(
            f"`{argument}` must be a file, not a folder. {received}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"The folder of `{argument}` does not exist: make it first. "
            f"{received}"
        )
    effective = os.access in os.supports_effective_ids
    if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise PermissionError(
            f"The folder of `{argument}` cannot be written to. {received}"
        )


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a temporary file beside `path`, then renames it to `path`.

    A process that is killed leaves a temporary file `NAME.xxxxxxxx.tmp`.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
