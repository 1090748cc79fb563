"""Files of results, each written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, and its folder where that is missing."""
    # Later: processes that measure a runtime do without Keras.
    from keras_distilled_embedding._utils.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(data))


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_results(name: str, folder: Path) -> dict:
    """Returns the stored results of a figure, `{}` where there are none.

    Args:
        name: Name of the figure.
        folder: Its folder. Results that are a single file lie beside it.
    """
    for path in (folder / "results.json", folder.parent / f"{name}.json"):
        if path.exists():
            results = json.loads(path.read_text("utf-8"))
            return {"rows": results} if isinstance(results, list) else results
    return {}
