"""Checks an installed wheel, without the repository: `make smoke`.

    python smoke.py [core|litert|hub|litertlm]

What is named is the extra that was installed, or nothing of them all.
"""

import string
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np

import keras_distilled_embedding as kde


def run(*arguments: str) -> None:
    """Runs the command that the wheel installs."""
    command = Path(sys.executable).with_name("keras-distilled-embedding")
    subprocess.run([command, *arguments], check=True)


def make_model() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="ids"),
            keras.layers.Embedding(1000, 64, name="tokens"),
            keras.layers.Dense(2),
        ]
    )


def make_task() -> keras.Model:
    """A language model of random weights that reads ASCII."""
    import keras_hub

    keras.utils.set_random_seed(0)
    letters = string.ascii_letters + string.digits + string.punctuation
    tokens = ["<|endoftext|>", "\u0120", *letters, "th"]  # \u0120: a space
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(
        {token: i for i, token in enumerate(tokens)}, ["t h"]
    )
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(tokens),
        num_layers=1,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=32,
        max_sequence_length=32,
    )
    return keras_hub.models.GPT2CausalLM(
        backbone, keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, 32)
    )


def generated(task: keras.Model) -> str:
    """A prompt and what follows it, up to 24 tokens."""
    task.compile(sampler="greedy")
    # KerasHub takes the padding of GPT-2 for an end.
    return task.generate("the other", max_length=24, stop_token_ids=None)


def core() -> None:
    """Compresses and saves a model, in Python and by the command."""
    model = make_model()
    student = kde.compress(model, compression=8.0)
    (row,) = kde.compression_report(student, model).to_dict()["rows"]
    assert 8 * row["bytes_after"] <= row["bytes_before"]
    kde.save_model(student, "student.keras")
    model.save("model.keras")
    run("inspect", "model.keras")
    run("compress", "model.keras", "-o", "out.keras")
    for name in ("student.keras", "out.keras"):
        layer = kde.load_model(name).get_layer("tokens")
        assert isinstance(layer, kde.layers.DistilledEmbedding)
    run("generate", "--help")


def litert() -> None:
    """Exports a file and runs it."""
    from ai_edge_litert.interpreter import Interpreter

    student = kde.compress(make_model(), compression=8.0, verbose=0)
    kde.save_model(student, "student.keras")
    kde.export_litert(student, "student.tflite")
    run("export", "student.keras", "-o", "out.tflite")
    ids = np.array([[1, 2, 999]], "int32")
    expected = keras.ops.convert_to_numpy(student(ids))
    for name in ("student.tflite", "out.tflite"):
        signature = Interpreter(name).get_signature_runner()
        (found,) = signature(ids=ids).values()
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def hub() -> None:
    """Compresses a language model of KerasHub; it writes, loaded again."""
    student = kde.compress(
        make_task(), 4.0, calibration_data=["the other text", "thus"] * 8
    )
    kde.save_model(student, "task.keras")
    written = generated(student)
    assert written.startswith("the other") and written != "the other"
    assert generated(kde.load_model("task.keras")) == written


def litertlm() -> None:
    """Bundles a language model; the runner writes what KerasHub does."""
    from keras_distilled_embedding_runner import Runner

    student = kde.compress(make_task(), 2.0, quantization=None, verbose=0)
    kde.export_litertlm(student, "task.litertlm", max_length=24)
    written = Runner("task.litertlm").generate("the other")
    assert written and generated(student).startswith(f"the other{written}")
    run("generate", "task.litertlm", "the other")


def main(extra: str = "core") -> None:
    {f.__name__: f for f in (core, litert, hub, litertlm)}[extra]()
    print(f"keras-distilled-embedding {kde.__version__}: {extra} works")


if __name__ == "__main__":
    main(*sys.argv[1:])
