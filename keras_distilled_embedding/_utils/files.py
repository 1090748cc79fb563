"""Files that appear whole or not at all, and folders with one writer."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None

_TEMPORARY = re.compile(r"(.+)\.[0-9a-f]{8}\.tmp")


def final_name(name: str) -> str | None:
    """What a file would have been called, whose writer was killed."""
    match = _TEMPORARY.fullmatch(name)
    return match and match[1]


def check_destination(argument: str, path: Path) -> None:
    """Refuses, before any work, a path that no file can be written to.

    Args:
        argument: What the path is called where it is given.
        path: The path.

    Raises:
        IsADirectoryError: If it is a folder.
        FileNotFoundError: If its folder does not exist.
        PermissionError: If nothing can be written to its folder.
    """
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
    """Writes a file beside `path`, then puts it in place.

    Of several processes that write one path, each writes a file of its own;
    the last to end has it. One that is killed leaves its `*.tmp`.

    Args:
        path: Path of the file. One that is there stays as it is on a failure.
        write: Function that writes to the open binary file it is given.
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


class FolderLock:
    """Keeps other processes out of a folder, as long as it is entered.

    Args:
        folder: Path of the folder. If it is not there yet, `acquire` is to be
            called again once it is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def acquire(self) -> None:
        """Takes the lock, unless it is taken already.

        Raises:
            BlockingIOError: If another process has it.
        """
        if fcntl is None or self._descriptor is not None:
            return
        if not self._folder.is_dir():
            return
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise BlockingIOError(
                    f"Another process writes to '{self._folder}': wait until "
                    "it has ended, or use another directory."
                ) from None
            return  # a file system without locks: nobody is kept out
        self._descriptor = descriptor

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
