"""Checks an installed wheel, without the repository: `make smoke`."""

import subprocess
import sys
from pathlib import Path

import keras

import keras_distilled_embedding as kde


def main() -> None:
    """Compresses and saves a small model, in Python and by the command."""
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(1000, 64, name="tokens"),
            keras.layers.Dense(2),
        ]
    )
    student = kde.compress(model, compression=8.0)
    (row,) = kde.compression_report(student, model).to_dict()["rows"]
    assert 8 * row["bytes_after"] <= row["bytes_before"]
    kde.save_model(student, "student.keras")
    model.save("model.keras")
    command = Path(sys.executable).with_name("keras-distilled-embedding")
    arguments = ["compress", "model.keras", "-o", "out.keras"]
    subprocess.run([command, *arguments], check=True)
    for name in ("student.keras", "out.keras"):
        layer = kde.load_model(name).get_layer("tokens")
        assert isinstance(layer, kde.layers.DistilledEmbedding)
    subprocess.run([command, "generate", "--help"], check=True)
    print(f"keras-distilled-embedding {kde.__version__} works")


if __name__ == "__main__":
    main()
