"""The command line, most of it in this process, some in its own."""

import contextlib
import importlib
import json
import os
import pty
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_distilled_embedding
from keras_distilled_embedding import __version__
from keras_distilled_embedding import compress
from keras_distilled_embedding import compression_report
from keras_distilled_embedding import inspect_model
from keras_distilled_embedding import load_model
from keras_distilled_embedding import save_model
from keras_distilled_embedding.cli import main
from keras_distilled_embedding.layers import DistilledEmbedding
from tests.test_compression import IDS
from tests.test_compression import VOCABULARY
from tests.test_compression import WIDTH
from tests.test_compression import make_two_of_one_name

# Keras's own, whenever it copies a variable to NumPy, as saving does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't:DeprecationWarning"
)
EXPORTS = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="the converter takes TensorFlow's saved models",
)
PROGRAM = "keras-distilled-embedding"
COMMANDS = ["inspect", "compress", "export"]
SMALL = 53


def make_model():
    """Two tables, and a dense layer that projects to the first vocabulary."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    tokens = keras.layers.Embedding(VOCABULARY, WIDTH, name="tokens")
    segments = keras.layers.Embedding(SMALL, WIDTH, name="segments")
    x = keras.layers.Add(name="add")([tokens(ids), segments(ids % SMALL)])
    x = keras.layers.Dense(WIDTH, "tanh", name="hidden")(x)
    x = keras.layers.Dense(VOCABULARY, name="head")(x)
    return randomize(keras.Model(ids, x, name="language_model"))


def randomize(model):
    """No two weights equal, and small enough that each one tells."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape, scale=0.3))
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model as Keras saves it, and another as `save_model` does."""
    folder = tmp_path_factory.mktemp("models")
    keras.utils.set_random_seed(0)
    model = make_model()
    model.compile("adam", "mse")
    model.save(folder / "own.keras")
    student = compress(model, rank=3, layers=["tokens"], verbose=0)
    save_model(student, folder / "compressed.keras")
    content = (folder / "own.keras").read_bytes()
    (folder / "truncated.keras").write_bytes(content[: len(content) // 2])
    with zipfile.ZipFile(folder / "other.keras", "w") as archive:
        archive.writestr("letter.txt", "Dear reader")
    np.save(folder / "frequencies.npy", np.arange(VOCABULARY))
    np.save(folder / "short.npy", np.arange(7))
    (folder / "empty.npy").touch()
    (folder / "text.npy").write_text("one two three")
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


def outputs_of(model, inputs=IDS):
    return ops.convert_to_numpy(model(inputs, training=False))


def as_json(report):
    return json.loads(json.dumps(report.to_dict()))


# inspect


def test_inspect(run, files):
    shown = run("inspect", "own.keras", "--json", "--compression", 4)
    assert shown.status == 0
    model = files.model
    table = dict(kind="Embedding", rank=3, factorized=False)
    assert json.loads(shown.out) == {
        "model": "language_model",
        "kind": "Functional",
        "parameters": model.count_params(),
        "bytes": 4 * model.count_params(),
        "compression": 4.0,
        "tables": [
            {
                **table,
                "layer": name,
                "kind": kind,
                "shape": [rows, WIDTH],
                "parameters": parameters,
                "bytes": 4 * parameters,
            }
            for name, kind, rows, parameters in (
                ("tokens", "Embedding", VOCABULARY, VOCABULARY * WIDTH),
                ("segments", "Embedding", SMALL, SMALL * WIDTH),
                ("head", "Dense", VOCABULARY, VOCABULARY * (WIDTH + 1)),
            )
        ],
    }
    assert shown.err == "Loading own.keras ...\n"
    assert json.loads(shown.out) == as_json(inspect_model(model, 4.0))

    shown = run("inspect", "own.keras")
    assert shown.status == 0
    share = 4 * VOCABULARY * WIDTH / (4 * model.count_params())
    for text in (
        "language_model (Functional)",
        f"{model.count_params():,} parameters",
        "tokens",
        "segments",
        f"{VOCABULARY} x {WIDTH}",
        f"{share:.1%}",
        "1 at 8x",
    ):
        assert text in shown.out


def test_inspect_what_is_compressed(run, files):
    shown = run("inspect", "compressed.keras", "--json")
    assert shown.status == 0
    parameters = 3 * (VOCABULARY + WIDTH)
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
    "compression": (["--compression", 3], dict(compression=3.0)),
    "rank": (["--rank", 3], dict(rank=3)),
    "bytes": (["--max-bytes", 2500], dict(max_bytes=2500)),
    "error": (["--max-error", 0.3], dict(max_error=0.3)),
    "int8": (
        ["--max-bytes", 1000, "--quantization", "int8"],
        dict(max_bytes=1000, quantization="int8"),
    ),
    "auto": (
        ["--max-bytes", 1300, "--quantization", "auto"],
        dict(max_bytes=1300, quantization="auto"),
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
    "frequencies": (
        [
            *("--rank", 2, "--layer", "tokens"),
            *("--token-frequencies", "frequencies.npy"),
        ],
        dict(
            rank=2,
            layers=["tokens"],
            token_frequencies=np.arange(VOCABULARY),
        ),
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
    expected = compress(files.model, verbose=0, **options)
    student = load_model(path)
    np.testing.assert_allclose(
        outputs_of(student), outputs_of(expected), rtol=1e-6, atol=1e-6
    )
    assert student.count_params() == expected.count_params()
    assert student.count_params() < files.model.count_params()
    assert student.compiled
    assert json.loads(shown.out) == as_json(
        compression_report(expected, files.model)
    )
    assert os.listdir(tmp_path) == ["out.keras"]


def test_options_tell():
    """No two rows above compress alike, or one may have been ignored."""
    model = make_model()
    found = [
        outputs_of(compress(model, verbose=0, **options)).tobytes()
        for name, (_, options) in OPTIONS.items()
        if name != "layers"  # which are all of them
    ]
    assert len(set(found)) == len(found)


def test_compress_for_people(run, files, tmp_path):
    path, picture = tmp_path / "out.keras", tmp_path / "bytes.png"
    shown = run(
        "compress", "own.keras", "-o", path, "--rank", 3, "--plot", picture
    )
    assert shown.status == 0
    student = load_model(path)
    for text in (
        "tokens",
        "segments",
        f"{VOCABULARY} x {WIDTH}",
        f"{VOCABULARY * WIDTH:,} -> {3 * (VOCABULARY + WIDTH):,}",
        f"{files.model.count_params():,} -> {student.count_params():,}",
    ):
        assert text in shown.out
    assert shown.err.splitlines() == [
        "Loading own.keras ...",
        "Factorising ...",
        f"Writing {path} ...",
    ]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("method", ["learned", "exact"])
def test_compress_by_a_method(method, run, monkeypatch):
    """It is passed on; to learn takes seconds."""
    given = {}

    def refuse(model, compression, **options):
        given.update(options)
        raise ValueError("no time")

    monkeypatch.setattr(keras_distilled_embedding, "compress", refuse)
    shown = run("compress", "own.keras", "-o", "x.keras", "--method", method)
    assert_bad_use(shown, "compress", "no time")
    assert given["method"] == method


def test_compress_what_is_compressed(run, files, tmp_path):
    """Another table of it."""
    path = tmp_path / "out.keras"
    shown = run(
        *("compress", "compressed.keras", "-o", path, "--rank", 2, "--json")
    )
    assert shown.status == 0, shown.err
    student = load_model(path)
    names = [
        layer.name
        for layer in student.layers
        if isinstance(layer, DistilledEmbedding)
    ]
    assert sorted(names) == ["segments", "tokens"]
    rows = {row["layer"]: row for row in json.loads(shown.out)["rows"]}
    assert (rows["tokens"]["rank"], rows["segments"]["rank"]) == (3, 2)
    expected = compress(files.student, rank=2, verbose=0)
    np.testing.assert_allclose(
        outputs_of(student), outputs_of(expected), rtol=1e-6, atol=1e-6
    )


def test_compress_tables_of_one_name(run, tmp_path):
    """Of which the first is too small to be compressed."""
    path, out = tmp_path / "model.keras", tmp_path / "out.keras"
    make_two_of_one_name((2, VOCABULARY)).save(path)
    shown = run("compress", path, "-o", out, "--compression", 3, "--json")
    assert shown.status == 0, shown.err
    (row,) = json.loads(shown.out)["rows"]
    assert row["shape"] == [VOCABULARY, WIDTH]
    assert 0 < row["error"] < 1


def test_compress_in_place(run, files, tmp_path):
    path = tmp_path / "model.keras"
    files.model.save(path)
    assert run("compress", path, "-o", path, "--rank", 2).status == 0
    assert load_model(path).count_params() < files.model.count_params()
    assert os.listdir(tmp_path) == ["model.keras"]


# export


def run_litert(path, ids=IDS):
    runner = interpreter_of(path).get_signature_runner()
    (outputs,) = runner(ids=ids).values()
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
    assert report["weights_bytes"] == 4 * model.count_params()
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
    assert "tokens (1 copy)" in shown.out
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
    assert {row["rounding"] for row in rows} == {"int8"}
    how = ["--quantization", asked] if asked else []
    shown = run("export", saved, "-o", path, "--json", *how)
    assert shown.status == 0, shown.err
    report = json.loads(shown.out)
    if asked == "none":
        assert report["quantization"] is None
        assert report["table_bytes"] == {}
        return
    assert report["quantization"] == "int8"
    assert report["table_bytes"] == {
        row["layer"]: row["bytes_after"] for row in rows
    }
    assert sum(report["table_bytes"].values()) <= 1300


# Bad use

BAD = {
    "missing": (["inspect", "none.keras"], "there is no file 'none.keras'"),
    "folder": (["inspect", "."], "there is no file '.'"),
    "truncated": (["inspect", "truncated.keras"], "not a saved model"),
    "another archive": (["inspect", "other.keras"], "not a saved model"),
    "text": (["inspect", "text.npy"], "not a saved model"),
    "compression of 1": (
        ["inspect", "own.keras", "--compression", "1"],
        "greater than 1",
    ),
    "no number": (
        ["inspect", "own.keras", "--compression", "much"],
        "invalid float value: 'much'",
    ),
    "no module": (
        ["inspect", "own.keras", "--import", "no_such_module"],
        "No module named 'no_such_module'",
    ),
    "compress, missing": (
        ["compress", "none.keras", "-o", "OUT"],
        "there is no file",
    ),
    "compress, truncated": (
        ["compress", "truncated.keras", "-o", "OUT"],
        "not a saved model",
    ),
    "no output": (["compress", "own.keras"], "-o/--output"),
    "no folder": (
        ["compress", "own.keras", "-o", "none/out.keras"],
        "The folder of `--output` does not exist",
    ),
    "output is a folder": (
        ["compress", "own.keras", "-o", "."],
        "`--output` must be a file",
    ),
    "out of reach": (
        ["compress", "own.keras", "-o", "OUT", "--compression", "1e6"],
        "out of reach",
    ),
    "bytes": (
        ["compress", "own.keras", "-o", "OUT", "--max-bytes", "10"],
        "max_bytes=10",
    ),
    "error": (
        ["compress", "own.keras", "-o", "OUT", "--max-error", "2"],
        "max_error=2.0",
    ),
    "rank": (["compress", "own.keras", "-o", "OUT", "--rank", "0"], "rank=0"),
    "auto without a budget": (
        ["compress", "own.keras", "-o", "OUT", "--quantization", "auto"],
        "needs `max_bytes`",
    ),
    "bits": (
        ["compress", "own.keras", "-o", "OUT", "--quantization", "int2"],
        "argument --quantization: invalid choice: 'int2'",
    ),
    "slow": (
        ["compress", "own.keras", "-o", "OUT", "--min-speedup", "0.5"],
        "min_speedup=0.5",
    ),
    "too slow": (
        ["compress", "own.keras", "-o", "OUT", "--rank", "5"]
        + ["--min-speedup", "4"],
        "at most 3 for `min_speedup`",
    ),
    "two sizes": (
        ["compress", "own.keras", "-o", "OUT", "--rank", "2"]
        + ["--max-bytes", "5000"],
        "not allowed with argument --rank",
    ),
    "no such layer": (
        ["compress", "own.keras", "-o", "OUT", "--layer", "nothing"],
        r"of \['tokens', 'segments'\].*'nothing'",
    ),
    "none large enough": (
        ["compress", "own.keras", "-o", "OUT", "--min-parameters", "9999"],
        "no embedding to compress",
    ),
    "heads": (
        ["compress", "own.keras", "-o", "OUT", "--heads", "shave"],
        "invalid choice: 'shave'",
    ),
    "no head": (
        ["compress", "own.keras", "-o", "OUT", "--heads", "tie"]
        + ["--layer", "segments", "--rank", "2"],
        "`heads` needs a",
    ),
    "no frequencies": (
        ["compress", "own.keras", "-o", "OUT"]
        + ["--token-frequencies", "none.npy"],
        "No such file.*none.npy",
    ),
    "short frequencies": (
        ["compress", "own.keras", "-o", "OUT", "--layer", "tokens"]
        + ["--token-frequencies", "short.npy", "--rank", "2"],
        r"shape \(61,\)",
    ),
    "empty frequencies": (
        ["compress", "own.keras", "-o", "OUT"]
        + ["--token-frequencies", "empty.npy"],
        "",
    ),
    "text as frequencies": (
        ["compress", "own.keras", "-o", "OUT"]
        + ["--token-frequencies", "text.npy"],
        "pickle",
    ),
    "no folder for the plot": (
        ["compress", "own.keras", "-o", "OUT", "--rank", "2"]
        + ["--plot", "none/picture.png"],
        "none/picture.png",
    ),
    "no such picture": (
        ["compress", "own.keras", "-o", "OUT", "--rank", "2"]
        + ["--plot", "picture.doc"],
        "'doc' is not supported",
    ),
    "export, missing": (
        ["export", "none.keras", "-o", "OUT"],
        "there is no file",
    ),
    "export, truncated": (
        ["export", "truncated.keras", "-o", "OUT"],
        "not a saved model",
    ),
    "export, no folder": (
        ["export", "own.keras", "-o", "none/out.tflite"],
        "does not exist: make it first",
    ),
    "quantization": (
        ["export", "own.keras", "-o", "OUT", "--quantization", "int3"],
        "argument --quantization: invalid choice: 'int3'",
    ),
    "length": (
        ["export", "own.keras", "-o", "OUT", "--sequence-length", "0"],
        "sequence_length=0",
    ),
}


def assert_bad_use(shown, command, match=""):
    """Exit status 2, and one line of what is wrong, the last one."""
    assert shown.status == 2
    assert shown.out == ""
    assert "Traceback" not in shown.err
    start = f"{PROGRAM} {command}: error: "
    *others, line = shown.err.splitlines()
    assert line.startswith(start) and len(line) > len(start)
    assert not any(other.startswith(start) for other in others)
    if match:
        assert pytest.RaisesExc(match=match).matches(Exception(line)), line


@pytest.mark.parametrize(
    ("arguments", "match"),
    [pytest.param(*row, id=name) for name, row in BAD.items()],
)
def test_bad_use(arguments, match, run, files, tmp_path):
    """And nothing is written: what was there is there."""
    path = tmp_path / "out"
    path.write_bytes(b"precious")
    arguments = [str(path) if a == "OUT" else a for a in arguments]
    assert_bad_use(run(*arguments), arguments[0], match)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(files.folder)) == sorted(files.names)


def test_no_command(run):
    for arguments in ((), ("shrink",)):
        shown = run(*arguments)
        assert shown.status == 2
        assert f"{PROGRAM}: error: " in shown.err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, run):
    shown = run(command, "--help")
    assert shown.status == 0
    assert shown.out.startswith(f"usage: {PROGRAM} {command} ")
    assert not shown.err


def test_help_and_version(run):
    assert run("--version").out.strip() == __version__
    shown = run("--help")
    assert shown.status == 0
    assert all(command in shown.out for command in COMMANDS)


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
    assert_bad_use(run(*arguments), "compress", "Could not locate.*'OwnModel'")
    assert not out.exists()
    shown = run(*arguments, "--import", "own_models")
    assert shown.status == 0, shown.err
    np.testing.assert_allclose(
        outputs_of(load_model(out)),
        outputs_of(compress(own.model, rank=2, verbose=0)),
        rtol=1e-6,
        atol=1e-6,
    )


# Processes of its own


def start(*arguments, stderr=subprocess.PIPE, **environment):
    command = Path(sys.executable).with_name(PROGRAM)
    if not command.exists():
        pytest.skip("the package's command is not installed")
    return subprocess.Popen(
        [command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
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
def test_the_command(files, own, tmp_path):
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
        start("export", files.folder / "truncated.keras", "-o", failed),
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
    student = compress(own.model, rank=2, verbose=0)
    assert json.loads(compressed.out) == as_json(
        compression_report(student, own.model)
    )
    assert "Factorising ...\n" in compressed.err
    loaded = load_model(out, {"own>OwnModel": type(own.model)})
    np.testing.assert_allclose(
        outputs_of(loaded), outputs_of(student), rtol=1e-6, atol=1e-6
    )

    assert_bad_use(exported, "export", "truncated.keras.*not a saved")
    assert failed.read_bytes() == b"precious"
    assert not list(tmp_path.glob("*.tmp"))
