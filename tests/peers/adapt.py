"""Keras's and KerasHub's own tests, fetched and adapted to this package."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path("build", "peers")

_LAYER = [
    (r"\blayers\.((Reversible)?Embedding)\b", r"adapters.\1"),
    (
        r"^(from keras\.src import layers)$",
        r"\1\nfrom tests.peers import adapters",
    ),
    (r"\.embeddings\.assign\(", r".assign_embeddings("),
    # Three factors, where Keras counts one table.
    (r"(expected_num_(non_)?trainable_weights)=1\b", r"\1=3"),
]
_EMBEDDING = [
    *_LAYER,
    (r"\.embeddings\.constraint\b", ".codes.constraint"),
    (r"\.embeddings\.numpy\(\)", ".embeddings"),
    (r"lora_embeddings_([ab])", r"lora_codes_\1"),
    (r"(non_trainable_weights), 1\)", r"\1, 3)"),
]
_DISTILLER = [
    (
        r"^from keras\.src\.distillation\.distiller import Distiller$",
        "from keras_distilled_embedding import Distiller\n"
        "from tests.peers.adapters import keras_logs",
    ),
    (r"import LogitsDistillation$", "import LogitsDistillation as _"),
    (
        r"^(import keras)$",
        r"\1\nfrom keras_distilled_embedding import LogitsDistillation",
    ),
    (r"(history\w*)\.history\b", r"keras_logs(\1.history)"),
]

# By package, then by file: what names this package's classes in the place of
# Keras's, as regular expressions. `differences.toml` has what differs by
# contract.
SOURCES = {
    "keras": {
        "keras/src/layers/core/embedding_test.py": _EMBEDDING,
        "keras/src/layers/core/reversible_embedding_test.py": [
            *_LAYER,
            (r"=3 if tie_weights else 2,", "=3 if tie_weights else 6,"),
        ],
        "keras/src/distillation/distiller_test.py": _DISTILLER,
        "keras/src/distillation/distillation_loss_test.py": [
            *_DISTILLER,
            (
                r"distiller\._(teacher|student)_feature_extractor\b",
                r"distiller._\1_run",
            ),
        ],
    },
    "keras-hub": {
        # Another library for input pipelines, which no test here needs.
        "keras_hub/src/tests/test_case.py": [(r"^import grain$", "")],
    },
}


def adapted(
    package: str, replacements: Sequence[tuple[str, str, str]] = ()
) -> list[Path]:
    """Writes the adapted tests of a package.

    Args:
        package: A key of `SOURCES`.
        replacements: What else to replace: a pattern of the files' names, a
            regular expression of the text that is there, and what is wanted.

    Returns:
        The files.

    Raises:
        ValueError: If a text is not there: Keras has changed it.
    """
    files = []
    with tarfile.open(_fetched(package)) as archive:
        root = archive.getnames()[0].partition("/")[0]
        for source, patterns in SOURCES[package].items():
            text = archive.extractfile(f"{root}/{source}").read().decode()
            path = FOLDER / source.rpartition("/")[2]
            pairs = list(patterns)
            pairs += [
                (old, new)
                for files_of, old, new in replacements
                if re.fullmatch(files_of, path.name)
            ]
            for old, new in pairs:
                text, count = re.subn(old, new, text, flags=re.M)
                if not count:
                    raise ValueError(
                        f"{source} of {root} has no {old!r} to replace: the "
                        "tests of this version need another adaptation"
                    )
            path.write_text(text)
            files.append(path)
    return files


def _fetched(package: str) -> Path:
    """The source distribution of the version that is installed."""
    version = importlib.metadata.version(package)
    archive = FOLDER / f"{package.replace('-', '_')}-{version}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet"]
        command += ["--no-deps", "--no-binary", package]
        command += ["--dest", str(FOLDER), f"{package}=={version}"]
        subprocess.run(command, check=True)
    return archive
