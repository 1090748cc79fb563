"""What every benchmark's report says, and how its files are written."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version
from pathlib import Path

PACKAGES = (
    "keras-distilled-embedding",
    "keras",
    "keras-hub",
    "tensorflow",
    "jax",
    "numpy",
)


def environment() -> str:
    """The versions and the machine behind a number, on one line."""
    versions = [text for text in map(_with_version, PACKAGES) if text]
    return (
        f"Python {platform.python_version()}, {', '.join(versions)}; "
        f"{len(os.sched_getaffinity(0))} cores, {_processor()}, "
        f"{_memory_gib():.0f} GiB"
    )


def _with_version(package: str) -> str:
    """The package and its version; nothing where it is not installed."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part_{path.name}")
    part.write_bytes(data)
    os.replace(part, path)


def _processor() -> str:
    """`platform` names the architecture; Linux knows the model too."""
    architecture = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return architecture
    models = [line for line in lines if line.startswith("model name")]
    if not models:
        return architecture
    return f"{models[0].split(':')[1].strip()} ({architecture})"


def _memory_gib() -> float:
    pages = os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
