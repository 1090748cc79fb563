"""The versions and the machine behind a number."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = (
    "keras-distilled-embedding",
    "keras",
    "keras-hub",
    "tensorflow",
    "jax",
    "numpy",
    "sentencepiece",
)


def environment() -> str:
    """Returns versions, machine and Keras's devices on one line."""
    versions = [text for text in map(_with_version, PACKAGES) if text]
    return (
        f"Python {platform.python_version()}, {', '.join(versions)}; "
        f"{len(os.sched_getaffinity(0))} cores, {_processor()}, "
        f"{_memory_gib():.0f} GiB{_keras()}"
    )


def environments(results: Any) -> list[str]:
    """Returns every environment that stands anywhere in results, once."""
    if isinstance(results, dict):
        own = results.get("environment")
        found = [own] if isinstance(own, str) and own else []
        results = list(results.values())
    else:
        found = []
    if isinstance(results, list):
        for value in results:
            found += environments(value)
    return list(dict.fromkeys(found))


def _keras() -> str:
    """Keras's backend and accelerators, where Keras is in use."""
    keras = sys.modules.get("keras")
    if keras is None:
        return ""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        names = [d.device_kind for d in jax.devices() if d.platform != "cpu"]
    else:
        devices = keras.distribution.list_devices()
        names = [name for name in devices if not name.startswith("cpu")]
    return f"; Keras on {', '.join([backend, *names])}"


def _with_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """The model where Linux tells it, and the architecture."""
    path, architecture = Path("/proc/cpuinfo"), platform.machine()
    text = path.read_text() if path.exists() else ""
    models = re.findall(r"model name\s*: (.*)", text)
    return f"{models[0]} ({architecture})" if models else architecture


def _memory_gib() -> float:
    pages = os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
