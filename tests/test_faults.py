"""What a disk, a path, another process or an unusual batch does to it."""

import multiprocessing
import os
import resource
import shutil
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_distilled_embedding as kde
import keras_distilled_embedding_cli as cli
from keras_distilled_embedding.layers import DistilledEmbedding
from tests.shared import tied_model
from tests.shared import to_numpy

VOCABULARY, WIDTH = 3_000, 16
IDS = np.arange(24, dtype="int32").reshape(2, 12)
BACKEND = keras.backend.backend()
tensorflow_only = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="the converter is TensorFlow's"
)


def make_teacher(dtype="int32"):
    keras.utils.set_random_seed(0)
    ids = keras.Input((12,), dtype=dtype, name="ids")
    embedding = keras.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, name="tokens"
    )
    x = keras.layers.Dense(WIDTH, name="hidden")(embedding(ids))
    return keras.Model(ids, embedding(x, reverse=True))


def make_student(dtype="int32"):
    return kde.compress(make_teacher(dtype), rank=8, verbose=0)


def outputs_of(model, ids=IDS):
    return to_numpy(model(ids))


# Writers: each writes a path; its content is larger than `LIMIT`.

LIMIT = 20_000


def write_model(path):
    kde.save_model(make_student(), path)


def write_litert(path):
    kde.export_litert(make_student(), path, verbose=False)


def write_cache(path):
    """A file a batch, of which only the last is large."""
    batches = [IDS] * 39 + [np.tile(IDS, (10, 1))]
    kde.cache_teacher(make_teacher(), batches, path, verbose=0)


FILE_WRITERS = [
    pytest.param(write_model, id="save_model"),
    pytest.param(write_litert, id="export_litert", marks=tensorflow_only),
]


def content_of(path):
    """Every file at or below a path, with its bytes."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {f: f.read_bytes() for f in files if f.is_file()}


@pytest.fixture
def small_files():
    """No file can grow beyond `LIMIT`, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def read_only():
    """A folder with a model that cannot be written, not by this user."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    write_model(folder / "old.keras")
    folder.chmod(0o555)
    "".encode("cp437")  # of zip files; another user may not read Python's own
    user = os.geteuid()
    if user == 0:
        os.setresuid(65534, 65534, 0)
    yield folder
    os.setresuid(user, user, user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("write", FILE_WRITERS)
def test_a_full_disk_leaves_the_old_file(write, tmp_path, request):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    request.getfixturevalue("small_files")
    with pytest.raises(OSError, match="File too large"):
        write(path)
    assert content_of(tmp_path) == {path: b"old"}


def test_a_full_disk_leaves_a_cache_to_go_on_with(tmp_path, request):
    path = tmp_path / "cache"
    request.getfixturevalue("small_files")
    with pytest.raises(OSError, match="File too large"):
        write_cache(path)
    before = content_of(path)
    assert sum(f.suffix == ".npz" for f in before) == 39
    assert not [f for f in before if "part" in f.name or "tmp" in f.name]
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, soft))
    write_cache(path)
    assert len(kde.TeacherCache(path)) == 40
    after = content_of(path)
    kept = {f for f in before if f.suffix == ".npz"}
    assert all(after[f] == before[f] for f in kept)


@pytest.mark.parametrize("write", FILE_WRITERS)
@pytest.mark.parametrize("name", ["old.keras", "new"])
def test_a_read_only_folder_stays_as_it_is(write, name, read_only):
    before = content_of(read_only)
    with pytest.raises(PermissionError, match=f"{read_only}/{name}"):
        write(read_only / name)
    assert content_of(read_only) == before


def test_a_cache_in_a_read_only_folder(read_only):
    with pytest.raises(PermissionError, match=f"{read_only}/cache"):
        write_cache(read_only / "cache")


def test_the_command_line_in_a_read_only_folder(read_only, capsys):
    paths = [f"{read_only}/{name}.keras" for name in ("old", "new")]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compress", paths[0], "-o", paths[1], "--rank", "4"])
    message = f"the folder cannot be written to. Received: '{paths[1]}'"
    assert message in capsys.readouterr().err


NAMES = ["größe 模型 🙂.keras", "with space", "-dash", "a'quote\"", "%41&;|"]


@pytest.mark.parametrize("name", NAMES)
def test_paths_of_any_name(name, tmp_path):
    path = tmp_path / name / name
    path.parent.mkdir()
    student = make_student()
    kde.save_model(student, path)
    loaded = kde.load_model(path)
    np.testing.assert_array_equal(outputs_of(loaded), outputs_of(student))
    kde.cache_teacher(make_teacher(), [IDS], path.parent / "c", verbose=0)
    assert len(kde.TeacherCache(path.parent / "c")) == 1


@tensorflow_only
@pytest.mark.parametrize("name", NAMES[:1])
def test_exports_and_commands_with_paths_of_any_name(name, tmp_path, capsys):
    path = tmp_path / name
    kde.save_model(make_student(), path)
    kde.export_litert(make_student(), f"{path}.tflite", verbose=False)
    for command in (["inspect"], ["export", "-o", f"{path}.2.tflite"]):
        assert cli.main([command[0], str(path), *command[1:]]) == 0
        assert "tokens" in capsys.readouterr().out
    assert (tmp_path / f"{name}.2.tflite").exists()


# Two processes and one path


def write_again_and_again(path, version, times, ready):
    student = make_student()
    student.get_layer("hidden").bias.assign(np.full(WIDTH, version, "float32"))
    ready.wait()
    for _ in range(times):
        kde.save_model(student, path)


@pytest.mark.slow
def test_two_processes_write_one_path(tmp_path):
    path = tmp_path / "model.keras"
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(3, timeout=300)
    writers = [
        context.Process(
            target=write_again_and_again, args=(path, version, 15, ready)
        )
        for version in (1, 2)
    ]
    for writer in writers:
        writer.start()
    ready.wait()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            with zipfile.ZipFile(path) as file:
                assert file.testzip() is None
            reads += 1
    assert reads
    assert [writer.exitcode for writer in writers] == [0, 0]
    bias = kde.load_model(path).get_layer("hidden").bias.numpy()
    assert set(bias) in ({1.0}, {2.0})
    assert list(tmp_path.iterdir()) == [path]


def test_one_process_at_a_time_writes_a_cache(tmp_path):
    path = tmp_path / "cache"

    def batches():
        yield IDS
        # The file's lock does not tell processes from objects of one.
        with pytest.raises(BlockingIOError, match="Another process writes"):
            write_cache(path)
        yield IDS

    kde.cache_teacher(make_teacher(), batches(), path, verbose=0)
    assert len(kde.TeacherCache(path)) == 2
    with pytest.raises(ValueError, match="40 batches"):  # not locked any more
        write_cache(path)


# Unusual batches


@pytest.mark.parametrize("dtype", ["int64", "uint32", "uint64"])
def test_wide_ids(dtype, tmp_path):
    """Of all rows the same, whatever the ids are."""
    if BACKEND == "jax" and dtype.endswith("64"):
        pytest.skip("JAX has 64 bits only with jax_enable_x64")
    student = make_student(dtype)
    expected = outputs_of(make_student())
    ids = IDS.astype(dtype)
    np.testing.assert_array_equal(outputs_of(student, ids), expected)
    kde.save_model(student, tmp_path / "model.keras")
    loaded = kde.load_model(tmp_path / "model.keras")
    assert loaded.inputs[0].dtype == dtype
    np.testing.assert_array_equal(outputs_of(loaded, ids), expected)


@tensorflow_only
def test_ids_of_64_bits_in_a_litert_file(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    path = tmp_path / "model.tflite"
    student = make_student("int64")
    kde.export_litert(student, path, verbose=False)
    runner = Interpreter(str(path)).get_signature_runner()
    (details,) = runner.get_input_details().values()
    assert details["dtype"] == np.int64
    (found,) = runner(ids=IDS.astype("int64")).values()
    np.testing.assert_allclose(found, outputs_of(student), atol=1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (0, 0), (3, 1), (1,)])
def test_shapes_without_much_in_them(shape, use_bias):
    layer = DistilledEmbedding(50, 8, rank=4, use_bias=use_bias)
    found = layer(np.ones(shape, "int32"))
    assert found.shape == (*shape, 8)
    logits = layer(np.ones((*shape, 8), "float32"), reverse=True)
    assert logits.shape == (*shape, 50)
    for quantization in (None, "int8", "int4", "int2"):
        for lora_rank in (None, 2):
            layer = DistilledEmbedding(
                50, 64, rank=32, quantization=quantization, lora_rank=lora_rank
            )
            assert layer(np.ones(shape, "int32")).shape == (*shape, 64)


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_step_on_a_batch_of_little_leaves_finite_weights(size, length):
    teacher = tied_model(30, 8)
    student = kde.compress(teacher, rank=2, verbose=0)
    distiller = kde.Distiller(
        teacher,
        student,
        [kde.EmbeddingDistillation(), kde.LogitsDistillation()],
    )
    distiller.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    x = np.ones((size, length), "int32")
    results = distiller.train_on_batch(x, x, return_dict=True)
    assert np.isfinite([*results.values()]).all()
    for weight in student.get_weights():
        assert np.isfinite(weight).all()


@pytest.mark.parametrize("shape", [(1, 50), (50,), (50, 1), (0, 50), (1, 3)])
def test_as_many_positions_as_tokens(shape):
    """An offset of each position is not taken for one of each token."""
    layer = DistilledEmbedding(50, 8, rank=4)
    layer.build()
    rng = np.random.default_rng(0)
    layer.offset.assign(rng.normal(size=8))
    states = rng.normal(size=(*shape, 8)).astype("float32")
    expected = states @ to_numpy(layer.embeddings).T
    logits = to_numpy(layer(states, reverse=True))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


# LoRA, then something else


def test_quantized_after_lora():
    """What was trained is rounded with the rest; none of it is lost."""
    layer = DistilledEmbedding(200, 64, rank=32, name="tokens")
    ids = keras.Input((4,), dtype="int32")
    model = keras.Model(ids, layer(layer(ids), reverse=True))
    without = outputs_of(model, IDS[:, :4])
    layer.enable_lora(4)
    rng = np.random.default_rng(0)
    layer.lora_codes_b.assign(rng.normal(size=(4, 32)))
    adapted = outputs_of(model, IDS[:, :4])
    layer.quantize("int8")
    error = np.linalg.norm(outputs_of(model, IDS[:, :4]) - adapted)
    assert error < 0.03 * np.linalg.norm(adapted)
    assert error < 0.1 * np.linalg.norm(without - adapted)


@pytest.mark.parametrize("lora", [False, True])
def test_frozen_factors_do_not_train(lora):
    student = make_student()
    layer = student.get_layer("tokens")
    if lora:
        layer.enable_lora(2)
    layer.trainable = False
    before = {v.path: to_numpy(v) for v in student.weights}
    student.compile("sgd", "mse")
    student.fit(IDS, np.ones((2, 12, VOCABULARY)), verbose=0)
    changed = {
        v.path
        for v in student.weights
        if not np.array_equal(before[v.path], to_numpy(v))
    }
    assert changed == {"hidden/kernel", "hidden/bias"}
