"""Packages that only some features need."""

from __future__ import annotations

import importlib


def require_package(package: str, extra: str, what: str = "Export") -> None:
    """Imports a package, or says which extra brings it.

    Args:
        package: What is imported.
        extra: The extra of this package that installs it.
        what: What needs it, as an error begins.

    Raises:
        ImportError: If it is missing.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{what} needs `{error.name}`: "
            f'pip install "keras-distilled-embedding[{extra}]"'
        ) from error
