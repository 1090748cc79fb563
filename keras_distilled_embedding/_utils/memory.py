"""Memory that is not needed any more."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Returns to the system what models in reference cycles have taken.

    The C library of Linux keeps what TensorFlow's converter frees.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
