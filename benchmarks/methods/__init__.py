"""Ways to make a table smaller: each registers itself in a file of its own.

`METHODS` holds all of them by name. README.md shows how to add one.
"""

import importlib
import pkgutil

from benchmarks.methods.base import METHODS
from benchmarks.methods.base import Table
from benchmarks.methods.rival import Rival

__all__ = [
    "METHODS",
    "Rival",
    "Table",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
