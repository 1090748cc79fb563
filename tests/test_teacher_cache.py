"""The cache of a teacher's outputs, against NumPy."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_distilled_embedding.compression import compress
from keras_distilled_embedding.distillation import EmbeddingDistillation
from keras_distilled_embedding.distillation import LogitsDistillation
from keras_distilled_embedding.distillation import TeacherCache
from keras_distilled_embedding.distillation import cache_teacher
from keras_distilled_embedding.distillation.teacher_cache import split_inputs
from tests.distillation_models import CountCalls
from tests.distillation_models import log_softmax
from tests.distillation_models import make_distiller
from tests.distillation_models import randomize

# The keys of a cached batch, as the documentation of `TeacherCache` has them.
INPUTS, TEACHER_OUTPUTS = "inputs", "teacher_outputs"
LOG_PROBABILITIES, CLASSES = "log_probabilities", "classes"
VOCABULARY, WIDTH = 41, 6
BATCH = 3
LENGTHS = (5, 5, 7, 4, 5)  # the first two do not tell that they vary


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


class Interrupted:
    """A dataset that breaks after some batches."""

    def __init__(self, batches, count):
        self.batches, self.count = batches, count

    def __iter__(self):
        yield from self.batches[: self.count]
        raise RuntimeError("interrupted")


def make_teacher(
    seed=0, vocabulary=VOCABULARY, scale=1.0, dropout=0.5, **options
):
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(vocabulary, WIDTH, **options)(ids)
    x = CountCalls(name="counter")(x)
    x = keras.layers.Dropout(dropout)(x)
    model = keras.Model(ids, keras.layers.Dense(vocabulary)(x))
    return randomize(model, seed, scale)


def make_translator():
    """Two inputs by name, two outputs of other vocabularies by name."""
    source = keras.Input((None,), dtype="int32", name="source")
    target = keras.Input((None,), dtype="int32", name="target")
    x = keras.layers.Embedding(VOCABULARY, WIDTH)(source)
    x = keras.layers.GlobalAveragePooling1D(keepdims=True)(x)
    x = x + keras.layers.Embedding(VOCABULARY, WIDTH)(target)
    outputs = {
        "words": keras.layers.Dense(VOCABULARY)(x),
        "kinds": keras.layers.Dense(3)(x[:, 0]),
    }
    inputs = {"source": source, "target": target}
    return randomize(keras.Model(inputs, outputs), 0, 1.0)


def make_batches(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(VOCABULARY, size=(BATCH, n + 1)) for n in lengths]
    return [(x[:, :-1].astype("int32"), x[:, 1:].astype("int32")) for x in ids]


def count_calls(teacher):
    counter = teacher.get_layer("counter")
    counter.calls = 0
    teacher.run_eagerly = True
    return counter


def assert_top_k(output, logits, k, temperature=1.0):
    log_p = log_softmax(ops.convert_to_numpy(logits) / temperature)
    kept, classes = output[LOG_PROBABILITIES], output[CLASSES]
    assert kept.shape == classes.shape == (*log_p.shape[:-1], k)
    assert kept.dtype == "float16" and classes.dtype == "int32"
    best = np.sort(log_p, axis=-1)[..., ::-1][..., :k]
    np.testing.assert_allclose(kept, best, rtol=1e-3, atol=1e-5)
    of_classes = np.take_along_axis(log_p, classes, axis=-1)
    np.testing.assert_allclose(of_classes, best, rtol=1e-5, atol=1e-5)


def assert_batches_equal(cache, batches):
    assert len(cache) == len(batches)
    for got, expected in zip(cache, batches):
        assert isinstance(got, tuple)
        assert set(got[0]) == {INPUTS, TEACHER_OUTPUTS}
        got = (got[0][INPUTS], *got[1:])
        keras.tree.assert_same_structure(got, tuple(expected))
        for a, b in zip(keras.tree.flatten(got), keras.tree.flatten(expected)):
            if b is None:
                assert a is None
                continue
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def contents(directory):
    """The files of a cache, but for the lock of its writer."""
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.suffix != ".lock"
    }


# What is kept


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 8, VOCABULARY, 100])
def test_keeps_the_largest_log_probabilities(tmp_path, top_k, temperature):
    teacher, batches = make_teacher(), make_batches()
    cache = cache_teacher(
        teacher, batches, tmp_path, top_k=top_k, temperature=temperature
    )
    assert_batches_equal(cache, batches)
    for (x, _), (source, _) in zip(cache, batches):
        (output,) = x[TEACHER_OUTPUTS]
        logits = teacher(source, training=False)
        assert_top_k(output, logits, min(top_k, VOCABULARY), temperature)
    assert (cache.top_k, cache.temperature) == (top_k, temperature)
    assert cache.directory == tmp_path


def test_several_outputs_and_inputs_by_name(tmp_path):
    teacher = make_translator()
    batches = []
    for i, (source, target) in enumerate(make_batches()):
        y = {"words": target, "kinds": np.full(BATCH, i, "int64")}
        weight = {"words": np.ones(target.shape, "float32"), "kinds": None}
        batches.append(({"target": target, "source": source}, y, weight))
    # In another order of the keys, which says nothing.
    batches[1] = (
        {"source": batches[1][0]["source"], **batches[1][0]},
        *batches[1][1:],
    )
    cache = cache_teacher(teacher, batches, tmp_path, top_k=5)
    assert_batches_equal(cache, batches)
    for (x, *_), (inputs, *_) in zip(cache, batches):
        logits = keras.tree.flatten(teacher(inputs))  # by name
        for output, expected, k in zip(x[TEACHER_OUTPUTS], logits, (3, 5)):
            assert_top_k(output, expected, k)


def test_keeps_any_structure(tmp_path):
    teacher = make_teacher()
    ids = make_batches()[0][0]
    for name, batch, structure in [
        ("array", ids, (ids,)),
        ("tuple", (ids,), (ids,)),
        ("list", [ids, ids], (ids, ids)),
        ("none", (ids, None, ids), (ids, None, ids)),
        ("nested", (ids, [{"a/b": (ids,), "c": []}]), None),
        ("ordered", (ids, collections.OrderedDict(b=ids, a=ids)), None),
        ("numbered", (ids, {1: ids}), None),
    ]:
        cache = cache_teacher(teacher, [batch], tmp_path / name)
        assert_batches_equal(cache, [structure or batch])


def test_classes_of_a_large_vocabulary(tmp_path):
    teacher = make_teacher(vocabulary=2**16 + 5)
    teacher.layers[-1].bias.assign(np.arange(2**16 + 5.0))
    ids = make_batches()[0][0]
    cache = cache_teacher(teacher, [ids], tmp_path, top_k=3)
    assert_top_k(cache[0][0][TEACHER_OUTPUTS][0], teacher(ids), 3)
    assert cache[0][0][TEACHER_OUTPUTS][0][CLASSES].max() > 2**16


def test_classes_of_a_small_vocabulary_take_two_bytes(tmp_path):
    cache_teacher(make_teacher(), make_batches(), tmp_path)
    with np.load(tmp_path / "batch_000000.npz") as batch:
        dtypes = sorted(array.dtype.name for array in batch.values())
    assert dtypes == ["float16", "int32", "int32", "uint16"]


def test_an_impossible_class_stays_finite(tmp_path):
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(4, 4)(ids)
    x = keras.layers.Lambda(
        lambda x: ops.where(ops.equal(ops.arange(4), 1), -np.inf, x)
    )(x)
    x = keras.Model(ids, x)
    cache = cache_teacher(x, [np.array([[1, 2]])], tmp_path)
    log_p = cache[0][0][TEACHER_OUTPUTS][0][LOG_PROBABILITIES]
    assert np.isfinite(log_p).all()
    assert (log_p[..., -1] == np.finfo("float16").min).all()
    assert np.exp(log_p[..., -1].astype("float32")).max() == 0.0


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset", "iterator"])
def test_sources(tmp_path, kind):
    teacher, batches = make_teacher(), make_batches()
    if kind == "tf.data":
        spec = tf.TensorSpec((None, None), "int32")
        dataset = tf.data.Dataset.from_generator(
            lambda: iter(batches), output_signature=(spec, spec)
        )
    else:
        dataset = Batches(batches) if kind == "PyDataset" else iter(batches)
    cache_teacher(teacher, dataset, tmp_path / "a")
    cache_teacher(teacher, batches, tmp_path / "b")
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "b").keys()
    for one, other in zip(
        TeacherCache(tmp_path / "a"), TeacherCache(tmp_path / "b")
    ):
        keras.tree.map_structure(np.testing.assert_array_equal, one, other)


def test_a_dataset_may_use_its_buffers_again(tmp_path):
    batches = make_batches((5, 5))

    class Reused:
        def __iter__(self):
            x = np.empty_like(batches[0][0])
            for ids, _ in batches:
                x[:] = ids
                yield x

    cache = cache_teacher(make_teacher(), Reused(), tmp_path)
    assert_batches_equal(cache, [(x,) for x, _ in batches])


@pytest.mark.parametrize("eager", [False, True])
def test_teacher_is_left_as_it_is(tmp_path, eager):
    teacher, batches = make_teacher(), make_batches()
    teacher.compile("sgd", "mse", run_eagerly=eager)
    function, layers = teacher.predict_function, list(teacher.layers)
    before = [np.array(v) for v in teacher.variables]
    optimizer = [np.array(v) for v in teacher.optimizer.variables]
    cache_teacher(teacher, batches, tmp_path)
    for variable, value in zip(teacher.variables, before, strict=True):
        assert np.array(variable).tobytes() == value.tobytes(), variable.path
    for variable, value in zip(
        teacher.optimizer.variables, optimizer, strict=True
    ):
        assert np.array(variable).tobytes() == value.tobytes()
    assert teacher.predict_function is function
    assert teacher.layers == layers and teacher.trainable


def test_a_subclassed_teacher(tmp_path):
    class Teacher(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = keras.layers.Embedding(VOCABULARY, VOCABULARY)

        def call(self, inputs):
            return self.embedding(inputs["ids"])

    teacher = Teacher()
    x = {"ids": make_batches()[0][0]}
    teacher(x)
    cache = cache_teacher(teacher, [(x,)], tmp_path, top_k=4)
    assert_top_k(cache[0][0][TEACHER_OUTPUTS][0], teacher(x), 4)


def test_half_precision_outputs(tmp_path):
    teacher = make_teacher(dtype="mixed_bfloat16")
    ids = make_batches()[0][0]
    cache = cache_teacher(teacher, [ids], tmp_path, top_k=4)
    logits = ops.cast(teacher(ids), "float32")
    assert_top_k(cache[0][0][TEACHER_OUTPUTS][0], logits, 4)


# Resuming


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_resumes(tmp_path, count):
    teacher, batches = make_teacher(), make_batches()
    counter = count_calls(teacher)
    whole = cache_teacher(teacher, batches, tmp_path / "whole")
    assert counter.calls == len(batches)
    path = tmp_path / "cache"
    with pytest.raises(RuntimeError, match="interrupted"):
        cache_teacher(teacher, Interrupted(batches, count), path)
    if count:
        with pytest.raises(ValueError, match=f"after {count} batches"):
            TeacherCache(path)
    counter.calls = 0
    cache = cache_teacher(teacher, batches, path)
    assert counter.calls == len(batches) - count
    for one, other in zip(cache, whole, strict=True):
        keras.tree.map_structure(np.testing.assert_array_equal, one, other)
    assert contents(path).keys() == contents(tmp_path / "whole").keys()


def test_resumes_after_a_kill(tmp_path):
    batches = make_batches()
    path, weights = tmp_path / "cache", tmp_path / "teacher.weights.h5"
    make_teacher(seed=3).save_weights(weights)
    code = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from tests.test_teacher_cache import *

        class Killed:
            def __iter__(self):
                yield from make_batches()[:3]
                # In the middle of writing the fourth batch.
                np.savez = lambda file, **arrays: (
                    file.write(b"half"), file.flush(),
                    os.kill(os.getpid(), signal.SIGKILL),
                )
                yield make_batches()[3]

        keras.layers.Dense(1)  # other automatic names
        keras.layers.Embedding(1, 1)
        teacher = make_teacher()
        teacher.load_weights(sys.argv[3])
        cache_teacher(teacher, Killed(), sys.argv[2])
    """
    arguments = [
        os.path.dirname(os.path.dirname(__file__)),
        str(path),
        str(weights),
    ]
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    (half,) = path.glob("batch_000003.npz.*.tmp")
    assert half.read_bytes() == b"half"
    with pytest.raises(ValueError, match="after 3 batches"):
        TeacherCache(path)
    teacher = make_teacher(seed=3)
    counter = count_calls(teacher)
    cache = cache_teacher(teacher, batches, path)
    assert counter.calls == 2
    assert_batches_equal(cache, batches)
    for (x, _), (source, _) in zip(cache, batches):
        assert_top_k(x[TEACHER_OUTPUTS][0], teacher(source), 32)
    assert not list(path.glob("*.tmp"))


def test_complete_cache_does_not_run_the_teacher(tmp_path):
    teacher, batches = make_teacher(), make_batches()
    cache_teacher(teacher, batches, tmp_path)
    before, counter = contents(tmp_path), count_calls(teacher)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(cache_teacher(teacher, batches, tmp_path)) == len(batches)
    assert counter.calls == 0
    assert contents(tmp_path) == before
    assert all(path.stat().st_mtime_ns == t for path, t in times.items())


@pytest.mark.parametrize("kind", ["list", "iterator"])
def test_complete_cache_of_the_same_size_is_not_read(tmp_path, kind):
    """Where the size is known, the first batch is enough."""
    teacher, batches = make_teacher(), make_batches()
    cache_teacher(teacher, batches, tmp_path)
    read = []

    class Recorded:
        def __iter__(self):
            for batch in batches:
                read.append(batch)
                yield batch

    class Sized(Recorded):
        def __len__(self):
            return len(batches)

    dataset = Sized() if kind == "list" else Recorded()
    assert_batches_equal(cache_teacher(teacher, dataset, tmp_path), batches)
    assert len(read) == (1 if kind == "list" else len(batches))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "delete"])
def test_damaged_files_are_reported(tmp_path, damage):
    teacher, batches = make_teacher(), make_batches()
    cache_teacher(teacher, batches, tmp_path)
    path = tmp_path / "batch_000001.npz"
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[:-10])
    elif damage == "flip":
        data[len(data) // 3] ^= 255
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    message = "batch_000001.npz.*Delete the directory.*`cache_teacher`"
    with pytest.raises(ValueError, match=message):
        list(TeacherCache(tmp_path))
    if damage == "delete":
        # Also before any work.
        for open_cache in (
            lambda: TeacherCache(tmp_path),
            lambda: cache_teacher(teacher, batches, tmp_path),
        ):
            with pytest.raises(ValueError, match=message):
                open_cache()
    shutil.rmtree(tmp_path)
    assert_batches_equal(cache_teacher(teacher, batches, tmp_path), batches)


@pytest.mark.parametrize("index", [0, 1])
def test_a_file_is_missing_in_an_interrupted_cache(tmp_path, index):
    teacher, batches = make_teacher(), make_batches()
    with pytest.raises(RuntimeError, match="interrupted"):
        cache_teacher(teacher, Interrupted(batches, 3), tmp_path)
    (tmp_path / f"batch_00000{index}.npz").unlink()
    with pytest.raises(ValueError, match=f"batch_00000{index}.npz.*missing"):
        cache_teacher(teacher, batches, tmp_path)


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    teacher, batches = make_teacher(), make_batches()
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", fail)
        with pytest.raises(OSError, match="disk full"):
            cache_teacher(teacher, batches, tmp_path)
    assert contents(tmp_path).keys() == {"manifest.json"}
    assert len(cache_teacher(teacher, batches, tmp_path)) == len(batches)


@pytest.mark.parametrize("exists", [False, True])
def test_one_writer_at_a_time(tmp_path, exists):
    path, batches = tmp_path / "cache", make_batches()
    if exists:
        path.mkdir()

    def dataset():
        yield batches[0]
        before = contents(path)
        # The lock is that of a file: it does not know who holds it.
        with pytest.raises(BlockingIOError, match="Another process writes"):
            cache_teacher(make_teacher(), batches, path)
        assert contents(path) == before
        yield from batches[1:]

    cache = cache_teacher(make_teacher(), dataset(), path)
    assert_batches_equal(cache, batches)
    # Afterwards another one may write.
    cache_teacher(make_teacher(), batches, path)


def test_an_error_releases_the_lock(tmp_path):
    teacher, batches = make_teacher(), make_batches()
    for change in ({"top_k": 0}, {"dataset": Interrupted(batches, 1)}):
        with pytest.raises((ValueError, RuntimeError)):
            cache_teacher(
                **{"teacher": teacher, "dataset": batches} | change,
                directory=tmp_path,
            )
    with pytest.raises(ValueError, match="`top_k`"):
        cache_teacher(teacher, batches, tmp_path, top_k=3)
    assert_batches_equal(cache_teacher(teacher, batches, tmp_path), batches)


# What is refused


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teacher", "`teacher` must be the one of the cache.*weights"),
        ("top_k", "`top_k` must be the one of the cache.*, 8; .*top_k=7"),
        ("temperature", "`temperature` must be the one of the cache.*, 1.0; "),
        ("other", "`dataset` must be the one.*another first batch"),
        ("reversed", "another first batch"),
        ("fewer", "a dataset of 3 batches"),
        ("fewer, unknown", "a dataset of 3 batches"),
        ("dtype", "another first batch"),
        ("structure", "another first batch"),
    ],
)
def test_refuses_another_cache(tmp_path, complete, change, message):
    batches = make_batches()
    arguments = {"teacher": make_teacher(), "directory": tmp_path, "top_k": 8}
    if complete:
        cache_teacher(dataset=batches, **arguments)
    else:
        with pytest.raises(RuntimeError, match="interrupted"):
            cache_teacher(dataset=Interrupted(batches, 4), **arguments)
    before = contents(tmp_path)
    arguments["dataset"] = {
        "other": make_batches(seed=1),
        "reversed": batches[::-1],
        "fewer": batches[:3],
        "fewer, unknown": iter(batches[:3]),
        "dtype": [(x.view("uint32"), y) for x, y in batches],
        "structure": [x for x, _ in batches],
    }.get(change, batches)
    if change == "teacher":
        arguments["teacher"] = make_teacher(seed=1)
    elif change in ("top_k", "temperature"):
        arguments[change] = 7
    counter = count_calls(arguments["teacher"])
    with pytest.raises(ValueError, match=message):
        cache_teacher(**arguments)
    assert counter.calls == 0
    assert contents(tmp_path) == before


@pytest.mark.parametrize("known", [True, False])
def test_refuses_more_batches(tmp_path, known):
    teacher, batches = make_teacher(), make_batches()
    cache_teacher(teacher, batches[:3], tmp_path)
    counter = count_calls(teacher)
    with pytest.raises(ValueError, match="`dataset`.*batches.*complete"):
        cache_teacher(teacher, batches if known else iter(batches), tmp_path)
    assert counter.calls == 0


def test_refuses_a_dataset_by_its_size_before_reading_it(tmp_path):
    class Unread(Batches):
        def __getitem__(self, index):
            raise AssertionError

    teacher, batches = make_teacher(), make_batches()
    cache_teacher(teacher, batches, tmp_path)
    for count in (4, 6):
        with pytest.raises(ValueError, match=f"a dataset of {count} batches"):
            cache_teacher(teacher, Unread([None] * count), tmp_path)


@pytest.mark.parametrize("top_k", [0, -1, 2.0, True, None, "8"])
def test_refuses_top_k(tmp_path, top_k):
    with pytest.raises(ValueError, match="`top_k` must be a positive"):
        cache_teacher(make_teacher(), make_batches(), tmp_path, top_k=top_k)


@pytest.mark.parametrize("temperature", [0, -1.0, np.nan, np.inf, True, "1"])
def test_refuses_temperature(tmp_path, temperature):
    with pytest.raises(ValueError, match="`temperature` must be a positive"):
        cache_teacher(
            make_teacher(), make_batches(), tmp_path, temperature=temperature
        )


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "at least one batch"),
        (iter([]), "at least one batch"),
        (tf.data.Dataset.from_tensors(np.ones((2, 2))).repeat(), "finite"),
        (7, "iterable of batches"),
        ([(np.ones((2, 2)),) * 4], "batch 0 of 4 parts"),
        ([np.array([["a"]])], "batches of numbers"),
        ([np.array([["a"]], "object")], "batches of numbers"),
        ([np.float32(1)], "batch axis"),
        ([({np.float32(1): np.ones((2, 2))},)], "strings for the keys"),
        ([({np.float32: np.ones((2, 2))},)], "strings for the keys"),
    ],
)
def test_refuses_datasets(tmp_path, dataset, message):
    path = tmp_path / "cache"
    with pytest.raises(ValueError, match=message):
        cache_teacher(make_teacher(), dataset, path)
    assert not path.exists()


def test_refuses_batches_that_do_not_match(tmp_path):
    (x, y), *_ = make_batches()
    for i, (second, message) in enumerate(
        [
            ((x,), "batches of one structure"),
            ((x, y[0]), "one number of axes"),
            ((x, y.astype("int64")), "one dtype"),
        ]
    ):
        path = tmp_path / str(i)
        with pytest.raises(ValueError, match=message):
            cache_teacher(make_teacher(), [(x, y), second], path)
        with pytest.raises(ValueError, match="incomplete|complete cache"):
            TeacherCache(path)


def test_refuses_teachers(tmp_path):
    batches = make_batches()
    with pytest.raises(TypeError, match="`teacher` must be a `keras.Model`"):
        cache_teacher(keras.layers.Dense(1), batches, tmp_path)
    with pytest.raises(ValueError, match="`teacher` must be built"):
        model = keras.Sequential([keras.layers.Embedding(2, 2)])
        cache_teacher(model, batches, tmp_path)
    ids = keras.Input((None,), dtype="int32")
    for outputs in (ids, keras.layers.Embedding(VOCABULARY, 1)(ids)[0, 0]):
        with pytest.raises(ValueError, match="`teacher` must predict logits"):
            cache_teacher(keras.Model(ids, outputs), batches, tmp_path)
    teacher = make_teacher()
    teacher.layers[-1].bias.assign(np.full(VOCABULARY, np.nan))
    with pytest.raises(ValueError, match="finite logits.*batch 0"):
        cache_teacher(teacher, batches, tmp_path)
    # Nothing was computed: another teacher may take the directory.
    assert len(cache_teacher(make_teacher(), batches, tmp_path)) == 5


def test_refuses_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="`directory` must be"):
            cache_teacher(make_teacher(), make_batches(), path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(FileNotFoundError, match="`cache_teacher`"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize(
    "text",
    ['{"format": ', "[]", "{}", '{"format": "other", "version": 1}', "\xff"],
)
def test_refuses_a_damaged_manifest(tmp_path, text):
    teacher, batches = make_teacher(), make_batches()
    cache_teacher(teacher, batches, tmp_path)
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="manifest.json"):
        cache_teacher(teacher, batches, tmp_path)
    with pytest.raises(ValueError, match="manifest.json"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize("version", [0, 1, 99])
def test_manifest_of_another_version(tmp_path, version):
    cache_teacher(make_teacher(), make_batches(), tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    for other in (manifest | {"version": version}, {"version": version}):
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match="this version of `cache_teacher`"):
            TeacherCache(tmp_path)


def test_manifest_that_lacks_an_entry(tmp_path):
    cache_teacher(make_teacher(), make_batches(), tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    for key in manifest:
        rest = {k: v for k, v in manifest.items() if k != key}
        path.write_text(json.dumps(rest))
        with pytest.raises(ValueError, match="manifest.json"):
            TeacherCache(tmp_path)


# The opened cache


def test_check(tmp_path):
    teacher = make_teacher()
    cache = cache_teacher(teacher, make_batches(), tmp_path)
    cache.check(teacher)
    cache.check(make_teacher())  # other names, same weights
    with pytest.raises(ValueError, match="`teacher` must be the one of the"):
        cache.check(make_teacher(seed=1))


def test_inputs_of_other_batches_are_left_alone():
    for x in (0, {}, {INPUTS: 0}, {INPUTS: 0, TEACHER_OUTPUTS: (), "a": 0}):
        assert split_inputs(x) == (x, None)
    output = {"log_probabilities": 1, "classes": 2}
    inputs, predictions = split_inputs({INPUTS: 0, TEACHER_OUTPUTS: (output,)})
    assert inputs == 0
    assert [(p.log_probabilities, p.classes) for p in predictions] == [(1, 2)]


def order_of(cache):
    return [int(np.ravel(y)[0]) for _, y in cache]


def test_shuffle_seed(tmp_path):
    ids = make_batches()[0][0]
    batches = [(ids, np.full(BATCH, i)) for i in range(20)]
    cache_teacher(make_teacher(), batches, tmp_path)
    assert order_of(TeacherCache(tmp_path)) == list(range(20))

    def orders(seed):
        cache, orders = TeacherCache(tmp_path, shuffle_seed=seed), []
        for _ in range(3):
            orders.append(order_of(cache))
            cache.on_epoch_end()
        assert cache.epoch == 3
        return orders

    first = orders(0)
    assert first == orders(0) and first != orders(1)
    assert all(sorted(order) == list(range(20)) for order in first)
    assert len({tuple(order) for order in first}) == 3
    resumed = TeacherCache(tmp_path, shuffle_seed=0)
    resumed.epoch = 2
    assert order_of(resumed) == first[2]
    assert order_of(TeacherCache(tmp_path, 0)) == [
        int(np.random.default_rng((0, 0)).permutation(20)[i]) for i in range(20)
    ]
    for seed in (-1, 1.0, True, "0"):
        with pytest.raises(ValueError, match="`shuffle_seed` must be"):
            TeacherCache(tmp_path, shuffle_seed=seed)


class Recorder(keras.Model):
    """A model that keeps the batches `fit` gives it."""

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(shape=())
        self.seen = []
        self.built = True

    def call(self, x):
        assert split_inputs(x)[1]
        return self.scale * ops.cast(x[INPUTS], "float32")

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        self.seen.append(int(y[0]))
        return ops.mean(y_pred)


@pytest.mark.parametrize("workers", [1, 3])
def test_fit_with_the_epoch_told_is_resumed_exactly(tmp_path, workers):
    ids = make_batches()[0][0]
    batches = [(ids, np.full(BATCH, i)) for i in range(7)]
    cache_teacher(make_teacher(), batches, tmp_path)

    def fit(**epochs):
        cache = TeacherCache(tmp_path, shuffle_seed=0, workers=workers)
        model = Recorder()
        model.compile("sgd", run_eagerly=True)
        follow = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, _: setattr(cache, "epoch", epoch)
        )
        model.fit(cache, shuffle=False, callbacks=[follow], verbose=0, **epochs)
        return model.seen

    seen = fit(epochs=4)
    assert [sorted(seen[i : i + 7]) for i in range(0, 28, 7)] == [
        list(range(7))
    ] * 4
    assert seen[:7] == order_of(TeacherCache(tmp_path, 0))
    assert fit(initial_epoch=2, epochs=4) == seen[14:]


def test_as_dataset(tmp_path):
    batches = [(x, y, None) for x, y in make_batches()]
    cache = cache_teacher(make_teacher(), batches, tmp_path, top_k=4)
    dataset = cache.as_dataset()
    assert int(dataset.cardinality()) == len(batches)
    x, y = dataset.element_spec
    (output,) = x[TEACHER_OUTPUTS]
    for spec, shape, dtype in (
        (x[INPUTS], (None, None), "int32"),
        (y, (None, None), "int32"),
        (output[LOG_PROBABILITIES], (None, None, 4), "float16"),
        (output[CLASSES], (None, None, 4), "int32"),
    ):
        assert spec.shape.as_list() == list(shape)
        assert spec.dtype == dtype
    for _ in range(2):
        for got, (x, y, _) in zip(dataset, batches, strict=True):
            np.testing.assert_array_equal(got[0][INPUTS], x)
            np.testing.assert_array_equal(got[1], y)


def test_batches_without_labels_but_weights_are_not_for_tensorflow(tmp_path):
    batches = [(x, None, np.ones(BATCH)) for x, _ in make_batches()]
    cache = cache_teacher(make_teacher(), batches, tmp_path)
    with pytest.raises(ValueError, match="a None in them"):
        cache.as_dataset()


def test_many_readers_at_once(tmp_path):
    batches = make_batches(LENGTHS * 4)
    cache = cache_teacher(make_teacher(), batches, tmp_path)
    indices = list(range(len(batches))) * 5
    with ThreadPoolExecutor(8) as pool:
        for i, (x, y) in zip(indices, pool.map(cache.__getitem__, indices)):
            np.testing.assert_array_equal(x[INPUTS], batches[i][0])
            np.testing.assert_array_equal(y, batches[i][1])
    np.testing.assert_array_equal(cache[-1][1], batches[-1][1])
    with pytest.raises(IndexError):
        cache[len(batches)]


def test_unicode_path(tmp_path):
    path = tmp_path / "übung" / "кэш-キャッシュ"  # neither is there
    batches = make_batches()
    assert_batches_equal(cache_teacher(make_teacher(), batches, path), batches)
    assert_batches_equal(TeacherCache(str(path)), batches)


def distill(teacher, data, losses=None, **options):
    student = compress(teacher, rank=2, quantization=None, verbose=0)
    distiller = make_distiller(
        (teacher, student),
        losses or [LogitsDistillation()],
        optimizer=keras.optimizers.SGD(0.5),
    )
    history = distiller.fit(data, verbose=0, **options)
    return student, history.history


def as_generator(batches):
    """What Keras takes batches of several widths from, on any backend."""
    while True:
        yield from batches


@pytest.mark.parametrize("top_k", [VOCABULARY, 3])
def test_a_student_learns_from_the_cache_as_from_the_teacher(tmp_path, top_k):
    teacher = make_teacher(dropout=0.0)
    # As a generator Keras takes only widths that its first two batches show.
    batches = make_batches((5, 7, 5, 4, 6))
    cache = cache_teacher(teacher, batches, tmp_path, top_k=top_k)
    losses = [EmbeddingDistillation(), LogitsDistillation(top_k=top_k)]
    options = dict(losses=losses, epochs=2)
    cached, cached_history = distill(
        teacher, cache, validation_data=cache, **options
    )
    live, history = distill(
        teacher,
        as_generator(batches),
        steps_per_epoch=len(batches),
        shuffle=False,
        **options,
    )
    for name, values in history.items():
        np.testing.assert_allclose(cached_history[name], values, rtol=2e-3)
    for a, b in zip(cached.weights, live.weights):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), atol=1e-3
        )
    assert cached_history["val_loss"][-1] < history["loss"][0]


def test_a_student_of_the_cache_does_not_run_the_teacher(tmp_path):
    teacher = make_teacher()
    cache = cache_teacher(teacher, make_batches(), tmp_path)
    teacher.call = None
    distill(teacher, cache)


def test_the_distiller_tells_the_epoch(tmp_path):
    teacher = make_teacher()
    batches = [
        (x, np.full_like(y, i)) for i, (x, y) in enumerate(make_batches())
    ]
    cache = cache_teacher(teacher, batches, tmp_path, shuffle_seed=0)
    orders = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: orders.append(order_of(cache))
    )
    # Not 1, which the cache would count up to by itself.
    distill(teacher, cache, epochs=6, initial_epoch=3, callbacks=watch)
    expected = [
        np.random.default_rng((0, epoch)).permutation(len(cache))
        for epoch in (3, 4, 5)
    ]
    np.testing.assert_array_equal(orders, expected)


@pytest.mark.parametrize(
    "loss, message",
    [
        (LogitsDistillation(2.0), "`temperature` .* must be the cache's 1.0"),
        (LogitsDistillation(top_k=9), "`top_k` of a `LogitsDistillation` must"),
        (keras.distillation.FeatureDistillation(), "FeatureDistillation"),
    ],
)
def test_losses_that_the_cache_cannot_serve(tmp_path, loss, message):
    teacher = make_teacher()
    cache = cache_teacher(teacher, make_batches(), tmp_path, top_k=8)
    # Also behind one that does not need it.
    for losses in ([loss], [EmbeddingDistillation(), loss]):
        with pytest.raises(ValueError, match=message):
            distill(teacher, cache, losses)
    with pytest.raises(ValueError, match="`teacher` must be the one of the"):
        distill(make_teacher(seed=1), cache)
