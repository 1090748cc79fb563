"""The memory of this process at its peak."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path


def peak_mb() -> float:
    """The most resident megabytes that this process has had."""
    # `ru_maxrss` would do, were it not inherited from the parent process.
    try:
        return _status_mb("VmHWM")
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1_024 / 1e6


def resident_mb() -> float:
    """The resident megabytes of this process now; Linux only."""
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1_024 / 1e6


def reset_peak() -> bool:
    """Lets the peak start from what is in use now, where Linux can."""
    gc.collect()
    try:
        # What XLA's compiler has freed, the C library still keeps.
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False
    try:  # proc(5)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
