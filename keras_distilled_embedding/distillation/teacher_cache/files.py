"""The files of a cache: `manifest.json` and `shard_00000.npz`, ...

No file holds pickled objects.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_distilled_embedding._utils.files import final_name

FORMAT = "keras_distilled_embedding.teacher_cache"
VERSION = 1
MANIFEST = "manifest.json"
_NAMES = re.compile(r"manifest\.json|shard_\d+\.npz")


def is_leftover(name: str) -> bool:
    """Whether a writer of the cache was killed while it wrote the file."""
    return bool(_NAMES.fullmatch(final_name(name) or ""))


def fingerprint_of(teacher: keras.Model) -> str:
    """Tells a model by its weights, in every process alike.

    Without their paths: Keras numbers unnamed layers within a process.
    """
    sha = hashlib.sha256()
    for variable in teacher.weights:
        value = ops.convert_to_numpy(variable)
        sha.update(f"{variable.dtype} {tuple(variable.shape)} ".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        kind = manifest["format"], manifest["version"]
        if kind == (FORMAT, VERSION):
            num_stored(manifest)
            for key in (
                "fingerprint",
                "top_k",
                "temperature",
                "num_classes",
                "structure",
                "complete",
            ):
                manifest[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            "`directory` must hold a cache of `cache_teacher`. Received: "
            f"'{path}', which is damaged or something else; delete it and "
            f"its directory to start anew ({type(error).__name__}: {error})"
        ) from error
    if kind != (FORMAT, VERSION):
        raise ValueError(
            f"`directory` must hold a cache of format {FORMAT}, version "
            f"{VERSION}. Received: '{path}' of format {kind[0]}, version "
            f"{kind[1]}; use another directory"
        )
    return manifest


def num_stored(manifest: dict[str, Any]) -> int:
    return sum(len(shard["digests"]) for shard in manifest["shards"])


def is_sound(path: Path, shard: dict[str, Any]) -> bool:
    """Whether a shard is whole, by the checksums of all its arrays."""
    try:
        if path.stat().st_size != shard["bytes"]:
            return False
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def damaged(path: Path, reason: Any) -> str:
    return (
        f"A file of the teacher's cache is damaged: '{path}' ({reason}). Call "
        "`cache_teacher` again with the same arguments to restore it"
    )


def check_same(
    cache: dict[str, Any], received: dict[str, Any], directory: Path
) -> None:
    """Refuses what a cache was not made with, of what was received."""
    differing = {k for k in received if received[k] != cache.get(k)}
    if "fingerprint" in differing:
        raise ValueError(
            "`teacher` must be the model whose outputs the cache holds, with "
            "the same weights; use another directory for another teacher. "
            f"Received: a teacher with fingerprint "
            f"{received['fingerprint'][:12]}, for the cache of "
            f"{cache['fingerprint'][:12]} in '{directory}'"
        )
    for name in ("top_k", "temperature"):
        if name in differing:
            raise ValueError(
                f"`{name}` must be the cache's {cache[name]}; use another "
                f"directory for another one. Received: {name}="
                f"{received[name]!r}, for the cache in '{directory}'"
            )
