"""The command line: what it does equals what the Python functions do."""

import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import pty
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_distilled_embedding as kde
from keras_distilled_embedding_cli import main
from tests.test_calibration import TEXTS
from tests.test_calibration import make_language_model

# Keras's own, whenever it copies a variable to NumPy, as saving does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't:DeprecationWarning"
)
EXPORTS = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="the converter takes TensorFlow's saved models",
)
ROOT = Path(__file__).parent.parent
PROGRAM = "keras-distilled-embedding"
COMMANDS = ["inspect", "compress", "export", "generate"]
VOCABULARY, SMALL, WIDTH = 67, 53, 16
IDS = np.array([[1, 60, 7, 3], [2, 5, 0, 0]], dtype="int32")


def make_model():
    """Two tables, and a dense layer that projects to the first vocabulary."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    tokens = keras.layers.Embedding(VOCABULARY, WIDTH, name="tokens")
    segments = keras.layers.Embedding(SMALL, WIDTH, name="segments")
    x = keras.layers.Add(name="add")([tokens(ids), segments(ids % SMALL)])
    x = keras.layers.Dense(WIDTH, "tanh", name="hidden")(x)
    x = keras.layers.Dense(VOCABULARY, name="head")(x)
    return randomize(keras.Model(ids, x, name="language_model"))


def make_two_of_one_name():
    """Two tables named "tokens"; the first is too small to be compressed."""
    inputs, outputs = [], []
    for i, size in enumerate((2, VOCABULARY)):
        ids = keras.Input((None,), dtype="int32")
        embedding = keras.layers.Embedding(size, WIDTH, name="tokens")
        inner = keras.Model(ids, embedding(ids), name=f"inner_{i}")
        inputs.append(keras.Input((None,), dtype="int32", name=f"ids_{i}"))
        outputs.append(inner(inputs[-1]))
    return randomize(keras.Model(inputs, outputs))


def randomize(model):
    """No two weights equal, and small enough that each one tells."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape, scale=0.3))
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model as Keras saves it, another as `save_model` does, and others."""
    folder = tmp_path_factory.mktemp("models")
    keras.utils.set_random_seed(0)
    model = make_model()
    model.compile("adam", "mse")
    model.save(folder / "own.keras")
    student = kde.compress(model, rank=3, layers=["tokens"], verbose=0)
    kde.save_model(student, folder / "compressed.keras")
    content = (folder / "own.keras").read_bytes()
    (folder / "truncated.keras").write_bytes(content[: len(content) // 2])
    with zipfile.ZipFile(folder / "other.keras", "w") as archive:
        archive.writestr("letter.txt", "Dear reader")
    return types.SimpleNamespace(
        folder=folder, model=model, student=student, names=os.listdir(folder)
    )


@pytest.fixture
def run(files, monkeypatch, capsys):
    """Runs the command line in this process, in the folder of the files."""
    monkeypatch.chdir(files.folder)

    def run_main(*arguments):
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as exit:
            status = exit.code
        shown = capsys.readouterr()
        return types.SimpleNamespace(
            status=status, out=shown.out, err=shown.err
        )

    return run_main


def outputs_of(model):
    return ops.convert_to_numpy(model(IDS, training=False))


def assert_same_outputs(model, expected):
    np.testing.assert_allclose(
        outputs_of(model), outputs_of(expected), rtol=1e-6, atol=1e-6
    )


def as_json(report):
    return json.loads(json.dumps(report.to_dict()))


# inspect


def test_inspect(run, files):
    shown = run("inspect", "own.keras", "--json", "--compression", 4)
    assert shown.status == 0
    assert shown.err == "Loading own.keras ...\nPlanning ...\n"
    inspection = json.loads(shown.out)
    assert inspection == as_json(kde.inspect_model(files.model, 4.0))
    assert inspection["model"] == "language_model"
    assert inspection["kind"] == "Functional"
    assert inspection["parameters"] == files.model.count_params()
    assert inspection["bytes"] == 4 * files.model.count_params()
    assert [size["compression"] for size in inspection["sizes"]] == [4.0]
    expected = [
        ("tokens", "Embedding", VOCABULARY, VOCABULARY * WIDTH),
        ("segments", "Embedding", SMALL, SMALL * WIDTH),
        ("head", "Dense", VOCABULARY, VOCABULARY * (WIDTH + 1)),
    ]
    for table, row in zip(inspection["tables"], expected, strict=True):
        name, kind, rows, parameters = row
        assert (table["layer"], table["kind"]) == (name, kind)
        assert table["shape"] == [rows, WIDTH]
        assert table["parameters"] == parameters
        assert table["bytes"] == 4 * parameters
        assert not table["factorized"]


def test_inspect_foretells_compress(run, tmp_path):
    """A size of `inspect` is what `compress` then reports."""
    sizes = ["--compression", 2, "--compression", 8]
    shown = run("inspect", "own.keras", "--json", *sizes)
    assert shown.status == 0, shown.err
    for size in json.loads(shown.out)["sizes"]:
        shown = run(
            *("compress", "own.keras", "-o", tmp_path / "out.keras", "--json"),
            *("--compression", size["compression"]),
        )
        report = json.loads(shown.out)
        rows = report["rows"]
        assert size["layers"] == [row["layer"] for row in rows]
        assert size["ranks"] == [row["rank"] for row in rows]
        assert {size["quantization"]} == {row["quantization"] for row in rows}
        assert size["table_bytes"] == sum(row["bytes_after"] for row in rows)
        assert size["model_bytes"] == report["model_bytes"]


def test_inspect_for_people(run, files):
    shown = run("inspect", "own.keras")
    assert shown.status == 0
    share = VOCABULARY * WIDTH / files.model.count_params()
    for text in (
        "language_model (Functional)",
        f"{files.model.count_params():,} parameters",
        "tokens",
        "segments",
        f"{VOCABULARY} x {WIDTH}",
        f"{share:.1%}",
        *(" 4x", " 8x", " 16x"),
    ):
        assert text in shown.out


def test_inspect_what_is_compressed(run, files):
    shown = run("inspect", "compressed.keras", "--json")
    assert shown.status == 0
    parameters = 3 * (VOCABULARY + WIDTH) + WIDTH + 3  # a center
    factors, *others = json.loads(shown.out)["tables"]
    assert factors == {
        "layer": "tokens",
        "kind": "DistilledEmbedding",
        "shape": [VOCABULARY, WIDTH],
        "parameters": parameters,
        "bytes": 4 * parameters,
        "rank": 3,
        "factorized": True,
    }
    assert not any(table["factorized"] for table in others)
    assert "DistilledEmbedding" in run("inspect", "compressed.keras").out


# compress

OPTIONS = {
    "none": ([], {}),
    "compression": (["--compression", 3], dict(compression=3.0)),
    "rank": (["--rank", 3], dict(rank=3)),
    "bytes": (["--max-bytes", 2500], dict(max_bytes=2500)),
    "error": (["--max-error", 0.3], dict(max_error=0.3)),
    "int8": (
        ["--max-bytes", 1000, "--quantization", "int8"],
        dict(max_bytes=1000, quantization="int8"),
    ),
    "int4": (
        ["--compression", 2, "--quantization", "int4"],
        dict(compression=2.0, quantization="int4"),
    ),
    "int2": (
        ["--compression", 2, "--quantization", "int2"],
        dict(compression=2.0, quantization="int2"),
    ),
    "floats": (
        ["--compression", 3, "--quantization", "none"],
        dict(compression=3.0, quantization=None),
    ),
    "speedup": (
        ["--max-bytes", 2500, "--min-speedup", 5],
        dict(max_bytes=2500, min_speedup=5.0),
    ),
    "layer": (
        ["--rank", 2, "--layer", "segments"],
        dict(rank=2, layers=["segments"]),
    ),
    "layers": (
        ["--rank", 2, "--layer", "segments", "--layer", "tokens"],
        dict(rank=2, layers=["segments", "tokens"]),
    ),
    "min-parameters": (
        ["--rank", 2, "--min-parameters", 900],
        dict(rank=2, min_parameters=900),
    ),
    "tie": (["--rank", 2, "--heads", "tie"], dict(rank=2, heads="tie")),
    "factorize": (
        ["--rank", 2, "--heads", "factorize"],
        dict(rank=2, heads="factorize"),
    ),
    "linear": (
        ["--rank", 2, "--activation", "none"],
        dict(rank=2, activation=None),
    ),
}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [pytest.param(*row, id=name) for name, row in OPTIONS.items()],
)
def test_compress_is_compress(arguments, options, run, files, tmp_path):
    """The file holds what Python returns, and the numbers are its report."""
    path = tmp_path / "out.keras"
    shown = run("compress", "own.keras", "-o", path, "--json", *arguments)
    assert shown.status == 0, shown.err
    expected = kde.compress(files.model, verbose=0, **options)
    student = kde.load_model(path)
    assert_same_outputs(student, expected)
    assert student.count_params() == expected.count_params()
    assert student.compiled
    report = json.loads(shown.out)
    assert report == as_json(kde.compression_report(expected, files.model))
    for row in report["rows"]:
        assert row["bytes_after"] < row["bytes_before"]
    assert os.listdir(tmp_path) == ["out.keras"]


def test_options_are_passed_on(run, monkeypatch):
    """All of them, also where two would give the same model."""
    given = {}

    def record(model, compression, **options):
        given.update(options, compression=compression)
        raise ValueError("no time")

    monkeypatch.setattr(kde, "compress", record)
    command = ["compress", "own.keras", "-o", "x.keras"]
    defaults = {
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
        "verbose": 0,
    }
    rows = [*OPTIONS.values(), (["--method", "learned"], {"method": "learned"})]
    for arguments, options in rows:
        assert_bad_use(run(*command, *arguments), "compress", "no time")
        assert given == {**defaults, **options}


def test_compress_for_people(run, files, tmp_path):
    path, picture = tmp_path / "out.keras", tmp_path / "bytes.png"
    shown = run(
        "compress", "own.keras", "-o", path, "--rank", 3, "--plot", picture
    )
    assert shown.status == 0
    student = kde.load_model(path)
    for text in (
        "tokens",
        "segments",
        f"{VOCABULARY} x {WIDTH}",
        f"{files.model.count_params():,} -> {student.count_params():,}",
    ):
        assert text in shown.out
    assert shown.err.splitlines() == [
        "Loading own.keras ...",
        "Factorizing ...",
        f"Writing {path} ...",
    ]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_compress_what_is_compressed(run, files, tmp_path):
    """Another table of it."""
    path = tmp_path / "out.keras"
    shown = run(
        *("compress", "compressed.keras", "-o", path, "--rank", 2, "--json")
    )
    assert shown.status == 0, shown.err
    rows = {row["layer"]: row for row in json.loads(shown.out)["rows"]}
    assert (rows["tokens"]["rank"], rows["segments"]["rank"]) == (3, 2)
    assert_same_outputs(
        kde.load_model(path), kde.compress(files.student, rank=2, verbose=0)
    )


def test_compress_tables_of_one_name(run, tmp_path):
    path, out = tmp_path / "model.keras", tmp_path / "out.keras"
    make_two_of_one_name().save(path)
    shown = run("compress", path, "-o", out, "--compression", 3, "--json")
    assert shown.status == 0, shown.err
    (row,) = json.loads(shown.out)["rows"]
    assert row["shape"] == [VOCABULARY, WIDTH]
    assert 0 < row["error"] < 1


def test_compress_in_place(run, files, tmp_path):
    path = tmp_path / "model.keras"
    files.model.save(path)
    assert run("compress", path, "-o", path, "--rank", 2).status == 0
    assert kde.load_model(path).count_params() < files.model.count_params()
    assert os.listdir(tmp_path) == ["model.keras"]


# export


def run_litert(path):
    (outputs,) = interpreter_of(path).get_signature_runner()(ids=IDS).values()
    return outputs


def interpreter_of(path):
    module = pytest.importorskip("ai_edge_litert.interpreter")
    return module.Interpreter(str(path))


@EXPORTS
@pytest.mark.parametrize("name", ["own", "compressed"])
def test_export(name, run, files, tmp_path):
    path = tmp_path / "model.tflite"
    shown = run("export", f"{name}.keras", "-o", path, "--json")
    assert shown.status == 0, shown.err
    model = files.model if name == "own" else files.student
    np.testing.assert_allclose(
        run_litert(path), outputs_of(model), rtol=1e-4, atol=1e-4
    )
    report = json.loads(shown.out)
    assert report["filepath"] == str(path)
    assert report["bytes"] == path.stat().st_size
    # The center of codes is a part of the offset there.
    stored = [w for w in model.weights if not w.path.endswith("center")]
    assert report["weights_bytes"] == 4 * sum(
        math.prod(weight.shape) for weight in stored
    )
    assert report["tables"] == {"tokens": 1, "segments": 1}
    assert report["signatures"] == ["serving_default"]
    assert f"Writing {path} ..." in shown.err


@EXPORTS
def test_export_for_people_of_one_length(run, files, tmp_path):
    path = tmp_path / "model.tflite"
    length = IDS.shape[1]
    shown = run(
        *("export", "compressed.keras", "-o", path),
        *("--sequence-length", length, "--quantization", "none"),
    )
    assert shown.status == 0, shown.err
    assert f"{path}: {path.stat().st_size:,} bytes" in shown.out
    assert "tokens (1 copy" in shown.out
    np.testing.assert_allclose(
        run_litert(path), outputs_of(files.student), rtol=1e-4, atol=1e-4
    )
    (inputs,) = interpreter_of(path).get_input_details()
    assert list(inputs["shape_signature"]) == [-1, length]


@EXPORTS
@pytest.mark.parametrize("name", ["own", "compressed"])
def test_export_quantized(name, run, files, tmp_path):
    path = tmp_path / "model.tflite"
    shown = run(
        *("export", f"{name}.keras", "-o", path, "--json"),
        *("--quantization", "int8"),
    )
    assert shown.status == 0, shown.err
    report = json.loads(shown.out)
    assert report["quantization"] == "int8"
    model = files.model if name == "own" else files.student
    assert report["bytes"] == path.stat().st_size
    assert report["weights_bytes"] < 2 * model.count_params()
    outputs, expected = run_litert(path), outputs_of(model)
    assert np.abs(outputs - expected).max() < 0.2 * expected.std()


@EXPORTS
@pytest.mark.parametrize("asked", [None, "none"])
def test_export_follows_the_model(asked, run, tmp_path):
    """Unless it is told otherwise."""
    saved, path = tmp_path / "student.keras", tmp_path / "model.tflite"
    shown = run(
        *("compress", "own.keras", "-o", saved, "--max-bytes", 1300),
        *("--quantization", "int8", "--json"),
    )
    assert shown.status == 0, shown.err
    rows = json.loads(shown.out)["rows"]
    assert {row["quantization"] for row in rows} == {"int8"}
    how = ["--quantization", asked] if asked else []
    shown = run("export", saved, "-o", path, "--json", *how)
    assert shown.status == 0, shown.err
    report = json.loads(shown.out)
    if asked == "none":
        student = kde.load_model(saved)
        assert report["quantization"] is None
        layers = [student.get_layer(name) for name in ("tokens", "segments")]
        assert report["table_bytes"] == {
            layer.name: 4
            * sum(
                math.prod(factor.shape)
                for factor in (layer.codes, layer.basis, layer.offset)
            )
            for layer in layers
        }
        return
    assert report["quantization"] == "int8"
    assert report["table_bytes"] == {
        row["layer"]: row["bytes_after"] for row in rows
    }
    assert sum(report["table_bytes"].values()) <= 1300


# --calibrate


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A saved model that reads texts, and a text for it."""
    folder = tmp_path_factory.mktemp("reader")
    model = randomize(make_language_model())
    kde.save_model(model, folder / "model.keras")
    (folder / "text.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    return types.SimpleNamespace(folder=folder, model=model)


def test_inspect_calibrated(run, reader, monkeypatch):
    monkeypatch.chdir(reader.folder)
    options = ["--calibrate", "text.txt", "--compression", 1.2, "--json"]
    shown = run("inspect", "model.keras", *options)
    assert shown.status == 0, shown.err
    assert json.loads(shown.out)["of_logits"]
    found = kde.inspect_model(reader.model, 1.2, calibration_data=TEXTS)
    assert json.loads(shown.out)["sizes"] == as_json(found)["sizes"]


def test_compress_calibrated(run, reader, monkeypatch):
    monkeypatch.chdir(reader.folder)
    shown = run(
        *("compress", "model.keras", "-o", "out.keras", "--rank", 3, "--json"),
        *("--calibrate", "text.txt"),
    )
    assert shown.status == 0, shown.err
    tables = [
        ops.convert_to_numpy(model.backbone.token_embedding.embeddings)
        for model in (
            kde.load_model("out.keras"),
            kde.compress(
                reader.model, rank=3, calibration_data=TEXTS, verbose=0
            ),
            kde.compress(reader.model, rank=3, verbose=0),
        )
    ]
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-4, atol=1e-5)
    assert np.abs(tables[0] - tables[2]).max() > 1e-2


def test_what_cannot_be_calibrated(run, reader, tmp_path):
    text = tmp_path / "empty.txt"
    text.write_text("\n \n")
    for command in (["inspect"], ["compress", "-o", tmp_path / "out.keras"]):
        model = reader.folder / "model.keras"
        shown = run(*command, model, "--calibrate", text)
        assert_bad_use(shown, command[0], "paragraph a line.*empty.txt")
        shown = run(*command, "own.keras", "--calibrate", text)
        match = "needs a model with a preprocessor.*'language_model'"
        assert_bad_use(shown, command[0], match)
    assert os.listdir(tmp_path) == ["empty.txt"]


# Help and bad use: at once, and without a framework.

COMPRESS = ["compress", "own.keras", "-o", "OUT"]
EXPORT = ["export", "own.keras", "-o", "OUT"]
BAD = {
    "no command": ([], "required: command"),
    "another command": (["shrink"], "invalid choice: 'shrink'"),
    "another option": ([*COMPRESS, "--faster"], "arguments: --faster"),
    "missing": (["inspect", "none.keras"], "no file 'none.keras'"),
    "a folder": (["inspect", "."], r"no file '\.'"),
    "truncated": (["inspect", "truncated.keras"], "not a saved model"),
    "no output": (["compress", "own.keras"], "required: -o/--output"),
    "no folder": (
        ["compress", "own.keras", "-o", "none/out.keras"],
        "--output: the folder does not exist.*'none/out.keras'",
    ),
    "output is a folder": (
        ["export", "own.keras", "-o", "."],
        r"--output: must be a file, not a folder. Received: '\.'",
    ),
    "two sizes": (
        [*COMPRESS, "--rank", "2", "--max-bytes", "5000"],
        "--max-bytes: not allowed with argument --rank",
    ),
    "compression": (
        [*COMPRESS, "--compression", "1"],
        "--compression: must be a number greater than 1. Received: '1'",
    ),
    "no number": (
        ["inspect", "own.keras", "--compression", "much"],
        "--compression: must be a number greater than 1. Received: 'much'",
    ),
    "no text": (
        ["inspect", "own.keras", "--calibrate", "none.txt"],
        "--calibrate: there is no file 'none.txt'",
    ),
    "infinite": (["inspect", "own.keras", "--compression", "inf"], "'inf'"),
    "rank": ([*COMPRESS, "--rank", "0"], "at least 1. Received: '0'"),
    "bytes": ([*COMPRESS, "--max-bytes", "1.5"], "integer.*'1.5'"),
    "error": ([*COMPRESS, "--max-error", "1"], "between 0 and 1.*'1'"),
    "speedup": ([*COMPRESS, "--min-speedup", "0.5"], "at least 1.*'0.5'"),
    "parameters": ([*COMPRESS, "--min-parameters", "-1"], "least 0.*'-1'"),
    "format": ([*COMPRESS, "--quantization", "int3"], "choice: 'int3'"),
    "heads": ([*COMPRESS, "--heads", "shave"], "choice: 'shave'"),
    "picture": ([*COMPRESS, "--plot", "a.doc"], r"must end in \.pdf.*'a.doc'"),
    "no folder for the picture": (
        [*COMPRESS, "--plot", "none/a.png"],
        "--plot: the folder does not exist.*'none/a.png'",
    ),
    "length": ([*EXPORT, "--sequence-length", "0"], "at least 1.*'0'"),
}
HELP = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
LISTS_FRAMEWORKS = """
import atexit, sys
from keras_distilled_embedding_cli import main

found = {"jax", "keras", "keras_distilled_embedding", "numpy", "tensorflow"}
atexit.register(lambda: print(found & set(sys.modules) or "none"))
sys.exit(main())
"""


def assert_bad_use(shown, command, match=""):
    """Exit status 2, and after the progress one line of what is wrong."""
    assert shown.status == 2
    assert shown.out == ""
    *others, line = shown.err.splitlines()
    assert not any(": error: " in other for other in others)
    assert re.match(rf"{PROGRAM}( {command})?: error: .*{match}", line), line


@pytest.mark.parametrize(
    ("arguments", "match"),
    [pytest.param(*row, id=name) for name, row in BAD.items()],
)
def test_bad_use(arguments, match, run, files, tmp_path):
    """And nothing is written: what was there is there."""
    path = tmp_path / "out"
    path.write_bytes(b"precious")
    shown = run(*(path if a == "OUT" else a for a in arguments))
    assert_bad_use(shown, next(iter(arguments), ""), match)
    assert len(shown.err.splitlines()) == 1
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(files.folder)) == sorted(files.names)


def test_folder_that_cannot_be_written_to(run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may everywhere
    shown = run("compress", "own.keras", "-o", "out.keras")
    assert_bad_use(shown, "compress", "cannot be written to.*'out.keras'")


def test_matplotlib_is_missing(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    shown = run("compress", "own.keras", "-o", "x", "--plot", "a.png")
    assert_bad_use(shown, "compress", r"keras-distilled-embedding\[plots\]")


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help(arguments, run):
    shown = run(*arguments)
    assert shown.status == 0
    assert not shown.err
    if arguments == ["--version"]:
        assert shown.out.strip() == kde.__version__
    else:
        usage = " ".join([PROGRAM, *arguments[:-1]])
        assert shown.out.startswith(f"usage: {usage} ")
    if arguments == ["--help"]:
        assert all(command in shown.out for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        *HELP,
        *(BAD[name][0] for name in ("missing", "compression", "two sizes")),
    ],
    ids=" ".join,
)
def test_no_framework_is_started(arguments, files):
    """In half a second of processor time, whatever else the machine does."""
    before = os.times()
    shown = subprocess.run(
        [sys.executable, "-c", LISTS_FRAMEWORKS, *arguments],
        cwd=files.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    after = os.times()
    # The runner is nothing without NumPy, and has its options in one file.
    found = "{'numpy'}" if arguments[0] == "generate" else "none"
    assert shown.stdout.splitlines()[-1] == found
    assert shown.returncode == (0 if arguments in HELP else 2)
    assert len(shown.stderr.splitlines()) == (arguments not in HELP)
    seconds = [
        getattr(after, name) - getattr(before, name)
        for name in ("children_user", "children_system")
    ]
    assert sum(seconds) < 0.5


# What only the model can tell


@pytest.mark.parametrize(
    "error", [ImportError, OSError, RuntimeError, TypeError, ValueError]
)
def test_errors_of_the_package(error, run, monkeypatch):
    def refuse(*_, **__):
        raise error("`what` is\nwrong.")

    monkeypatch.setattr(kde, "compress", refuse)
    shown = run("compress", "own.keras", "-o", "out.keras")
    assert_bad_use(shown, "compress", "`what` is wrong.$")


def test_faults_are_not_hidden(run, monkeypatch):
    def fail(*_, **__):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(kde, "inspect_model", fail)
    with pytest.raises(KeyError, match="a fault of ours"):
        run("inspect", "own.keras")


def test_errors_that_the_model_tells(run):
    shown = run("inspect", "other.keras")
    assert_bad_use(shown, "inspect", "not a file written by")
    shown = run(*COMPRESS[:-1], "x.keras", "--layer", "nothing")
    assert_bad_use(shown, "compress", "'nothing'")
    shown = run("inspect", "own.keras", "--import", "no_such_module")
    assert_bad_use(shown, "inspect", "No module named 'no_such_module'")


# Classes of the user's own

OWN = """
import keras

@keras.saving.register_keras_serializable(package="own")
class OwnModel(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = keras.layers.ReversibleEmbedding(61, 16, name="tokens")

    def call(self, ids):
        return self.tokens(self.tokens(ids), reverse=True)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A saved model of a class in a module, which is not imported."""
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)

    def forget():
        sys.modules.pop("own_models", None)
        keras.saving.get_custom_objects().pop("own>OwnModel", None)

    model = importlib.import_module("own_models").OwnModel(name="mine")
    model(IDS)
    path = tmp_path / "mine.keras"
    randomize(model).save(path)
    forget()
    yield types.SimpleNamespace(model=model, path=path, folder=tmp_path)
    forget()


def test_classes_of_ones_own_are_imported(run, own):
    out = own.folder / "out.keras"
    arguments = ["compress", own.path, "-o", out, "--rank", 2, "--json"]
    match = "Could not locate.*'OwnModel'.*with --import"
    assert_bad_use(run(*arguments), "compress", match)
    assert not out.exists()
    shown = run(*arguments, "--import", "own_models")
    assert shown.status == 0, shown.err
    assert_same_outputs(
        kde.load_model(out), kde.compress(own.model, rank=2, verbose=0)
    )


# Processes of its own


def start(*arguments, stderr=subprocess.PIPE, **environment):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "keras_distilled_embedding_cli"),
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return types.SimpleNamespace(status=process.returncode, out=out, err=err)


def read_all(terminal):
    """What was shown on a terminal, once its other end is closed."""
    shown = b""
    with contextlib.suppress(OSError):  # that is how it ends on Linux
        while part := os.read(terminal, 1 << 16):
            shown += part
    os.close(terminal)
    return shown.decode()


def save_task(path):
    """A model of KerasHub, as Keras saves it."""
    hub = pytest.importorskip("keras_hub")
    backbone = hub.models.BertBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=1,
        num_heads=2,
        hidden_dim=WIDTH,
        intermediate_dim=24,
        max_sequence_length=8,
    )
    hub.models.BertMaskedLM(backbone, preprocessor=None).save(path)


@pytest.mark.slow
def test_processes(files, own, tmp_path):
    """Three at once: for a terminal, with a module's path, and in vain."""
    save_task(tmp_path / "bert.keras")
    out, failed = tmp_path / "out.keras", tmp_path / "failed.tflite"
    failed.write_bytes(b"precious")
    terminal, its_end = pty.openpty()
    inspected, compressed, exported = (
        start("inspect", tmp_path / "bert.keras", "--json", stderr=its_end),
        start(
            *("compress", own.path, "-o", out, "--rank", 2, "--json"),
            *("--import", "own_models"),
            PYTHONPATH=os.pathsep.join(
                [str(own.folder), os.environ.get("PYTHONPATH", "")]
            ),
        ),
        start("export", files.folder / "other.keras", "-o", failed),
    )
    os.close(its_end)

    # Progress moves on the terminal; the result is all that is passed on.
    progress = read_all(terminal)
    shown, compressed, exported = map(finish, (inspected, compressed, exported))
    assert shown.status == 0, progress
    assert "Loading" in progress
    shapes = {
        table["layer"]: table["shape"]
        for table in json.loads(shown.out)["tables"]
    }
    assert shapes["token_embedding"] == [VOCABULARY, WIDTH]

    assert compressed.status == 0, compressed.err
    student = kde.compress(own.model, rank=2, verbose=0)
    assert json.loads(compressed.out) == as_json(
        kde.compression_report(student, own.model)
    )
    # Beside notes of TensorFlow's start.
    assert [x for x in compressed.err.splitlines() if x.endswith(" ...")] == [
        f"Loading {own.path} ...",
        "Factorizing ...",
        f"Writing {out} ...",
    ]
    loaded = kde.load_model(out, {"own>OwnModel": type(own.model)})
    assert_same_outputs(loaded, student)

    assert_bad_use(exported, "export", "other.keras.*not a file written")
    assert failed.read_bytes() == b"precious"
    assert not list(tmp_path.glob("*.tmp"))
