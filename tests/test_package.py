"""What is promised of the package as a whole."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_distilled_embedding as kde

ROOT = Path(__file__).parent.parent
NAMES = [name for name in kde.__all__ if not name.startswith("_")]


def test_all_is_true():
    assert len(set(kde.__all__)) == len(kde.__all__)
    for name in kde.__all__:
        assert getattr(kde, name) is not None


# A changed default changes the results of code that does not.
DEFAULTS = {
    kde.layers.DistilledEmbedding: {
        "activation": "relu",
        "use_bias": True,
        "tie_weights": True,
        "embeddings_regularizer": None,
        "embeddings_constraint": None,
        "mask_zero": False,
        "reverse_dtype": None,
        "logit_soft_cap": None,
        "quantization": None,
    },
    kde.factorize: {
        "activation": "relu",
        "use_bias": True,
        "method": "exact",
        "quantization": None,
        "row_weights": None,
        "column_weights": None,
        "seed": 0,
        "verbose": 0,
    },
    kde.compress: {
        "compression": None,
        "rank": None,
        "max_bytes": None,
        "max_error": None,
        "min_speedup": None,
        "quantization": "auto",
        "activation": "relu",
        "method": "exact",
        "calibration_data": None,
        "layers": None,
        "min_parameters": 0,
        "heads": None,
        "verbose": 1,
    },
    kde.Distiller: {
        "distillation_losses": None,
        "distillation_loss_weights": None,
        "student_loss_weight": 0.5,
        "name": "distiller",
        "student_training": True,
        "train": "all",
    },
    kde.EmbeddingDistillation: {
        "num_rows": None,
        "seed": 0,
        "row_weights": None,
    },
    kde.LogitsDistillation: {"temperature": 1.0, "top_k": None},
    kde.export_litert: {
        "quantization": None,
        "signatures": None,
        "batch_size": None,
        "sequence_length": None,
        "verbose": True,
    },
    kde.export_litert_seq2seq: {
        "source_length": None,
        "quantization": None,
        "verbose": True,
    },
    kde.export_litertlm: {
        "prefill_lengths": (8, 32, 128),
        "quantization": None,
        "verbose": True,
    },
}


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda f: f.__name__)
def test_defaults_are_kept(function):
    parameters = inspect.signature(function).parameters
    expected = DEFAULTS[function]
    assert {name: parameters[name].default for name in expected} == expected


def test_version_is_written_once():
    assert metadata.version("keras-distilled-embedding") == kde.__version__


def test_command_is_installed():
    (command,) = metadata.entry_points(
        group="console_scripts", name="keras-distilled-embedding"
    )
    assert command.value == "keras_distilled_embedding_cli:main"


def run_python(code, *arguments):
    """What a program prints, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout.strip()


OPTIONAL = [
    "ai_edge_litert",
    "ai_edge_quantizer",
    "keras_hub",
    "keras_nlp",
    "sacrebleu",
    "tensorflow_text",
]


def test_import_needs_no_optional_package():
    """Nor matplotlib, which Keras itself imports where it is installed."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({[*OPTIONAL, "matplotlib"]}))
import keras_distilled_embedding
print("imported")
"""
    assert run_python(code) == "imported"


IMPORTS = ["import keras", "import keras_distilled_embedding"]


@pytest.mark.parametrize("imports", [IMPORTS, IMPORTS[::-1]], ids="\n".join)
def test_keras_loads_what_keras_saved(imports, tmp_path):
    """Whichever is imported first, Keras knows the package's classes.

    No optional package is imported for it.
    """
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            kde.layers.DistilledEmbedding(50, 8, rank=3, name="tokens"),
        ]
    )
    model.save(tmp_path / "model.keras")
    code = f"""
import sys
import numpy as np
print([name for name in {OPTIONAL} if name in sys.modules])
model = keras.saving.load_model(sys.argv[1])
np.save(sys.argv[2], model(np.arange(50)[None]))
print(type(model.get_layer("tokens")).__name__)
"""
    shown = run_python(
        "\n".join([*imports, code]),
        tmp_path / "model.keras",
        tmp_path / "outputs.npy",
    )
    assert shown.splitlines() == ["[]", "DistilledEmbedding"]
    np.testing.assert_allclose(
        np.load(tmp_path / "outputs.npy"),
        keras.ops.convert_to_numpy(model(np.arange(50)[None])),
        rtol=1e-6,
    )


def test_layers_of_keras_nlp_work():
    import keras_hub
    import keras_nlp

    assert keras_nlp.layers.TransformerEncoder is (
        keras_hub.layers.TransformerEncoder
    )
    ids = keras.Input((None,), dtype="int32")
    x = keras_nlp.layers.ReversibleEmbedding(50, 8)(ids)
    x = keras_nlp.layers.TransformerEncoder(16, 2)(x)
    model = keras.Model(ids, x)
    assert kde.compress(model, 4.0, verbose=0, quantization=None)(
        np.ones((1, 3))
    ).shape == (
        1,
        3,
        8,
    )


def _python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def _namespace():
    return {
        "keras": keras,
        "np": np,
        "kde": kde,
        **vars(kde),
        **vars(kde.layers),
    }


def _public_objects():
    objects = {name: getattr(kde, name) for name in NAMES if name != "layers"}
    for name in kde.layers.__all__:
        objects[name] = getattr(kde.layers, name)
    objects["from_embedding"] = kde.layers.DistilledEmbedding.from_embedding
    return objects


@pytest.mark.parametrize("name", _public_objects())
def test_public_objects_are_documented(name):
    documented = inspect.getdoc(_public_objects()[name])
    assert "\n\nArgs:\n" in documented or "\n\nAttributes:\n" in documented


def test_api_pages_show_all_public_objects():
    pages = (ROOT / "docs" / "api").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    shown = re.findall(r"^::: keras_distilled_embedding\.(.+)$", text, re.M)
    expected = {f"layers.{name}" for name in kde.layers.__all__}
    expected |= set(NAMES) - {"layers"}
    assert len(set(shown)) == len(shown)
    assert set(shown) == expected


# JAX's own converter warns of JAX.
_of_jax = pytest.mark.filterwarnings(
    "ignore:The `native_serialization`:DeprecationWarning"
)


@_of_jax
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, value in _public_objects().items()
        if "```python" in inspect.getdoc(value)
    ],
)
def test_examples_of_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {**_namespace(), **_trained_things(tmp_path)}
    blocks = _python_blocks(inspect.getdoc(_public_objects()[name]))
    _skip_exports_elsewhere(blocks)
    for block in blocks:
        exec(inspect.cleandoc(block), namespace)


def _skip_exports_elsewhere(blocks):
    if keras.backend.backend() != "tensorflow" and any(
        "export_litert(" in block for block in blocks
    ):
        pytest.skip("export needs TensorFlow")


def _trained_things(folder):
    """What the examples of docstrings take as given."""
    teacher = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(500, 64),
            keras.layers.Dense(3),
        ]
    )
    student = kde.compress(teacher, 4.0, verbose=0, quantization=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller = kde.Distiller(teacher, student, kde.LogitsDistillation())
    distiller.compile("adam", loss)
    batches = [(np.ones((2, 5), "int32"), np.ones((2, 5), "int32"))]
    kde.cache_teacher(teacher, batches, folder / "teacher_cache", verbose=0)
    return {
        "teacher": teacher,
        "student": student,
        "loss": loss,
        "distiller": distiller,
        "inputs": batches[0][0],
        "labels": batches[0][1],
        "train_batches": batches,
    }


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted((ROOT / "keras_distilled_embedding").rglob("*.py"))
        if ">>> " in path.read_text(encoding="utf-8")
    ],
    ids=lambda path: path.stem,
)
def test_doctests(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts))
    namespace = {**vars(module), "np": np}
    result = doctest.testmod(
        module,
        extraglobs=namespace,
        optionflags=doctest.NORMALIZE_WHITESPACE,
    )
    assert result.attempted > 0
    assert result.failed == 0


@_of_jax
# KerasHub's: it does not close the vocabulary that it has read.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*vocabulary.spm:"
    "pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)
def test_documents(path, tmp_path, monkeypatch):
    """Their code runs from top to bottom, and their links lead somewhere."""
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    namespace = _namespace()
    blocks = _python_blocks(text)
    assert blocks
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    _skip_exports_elsewhere(blocks)
    for block in blocks:
        exec(block, namespace)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
