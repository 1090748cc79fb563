"""What several test files need: models, references in NumPy, matchers."""

import os

import filelock
import keras
import numpy as np
from keras import ops


def to_numpy(x):
    """A tensor, variable or array as a NumPy array."""
    return ops.convert_to_numpy(x)


def random_ids(vocabulary, shape=(4, 7), seed=0):
    """int32 token ids."""
    rng = np.random.default_rng(seed)
    return rng.integers(vocabulary, size=shape).astype("int32")


def random_table(rows=300, columns=24, seed=0, mean=0.0):
    """A float32 table whose singular values fall, around a mean."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1.0, 0.05, columns)
    table = rng.normal(size=(rows, columns)) * scales
    rotation = np.linalg.qr(rng.normal(size=(columns, columns)))[0]
    return (table @ rotation + mean).astype("float32")


def lost_share(table, reconstruction):
    """`||E - E~||^2 / ||E||^2`, in float64."""
    table = np.asarray(table, "float64")
    return np.square(table - reconstruction).sum() / np.square(table).sum()


def affine_optimum(table, rank):
    """The least share of the energy that any affine form of a rank loses."""
    table = np.asarray(table, "float64")
    singular = np.linalg.svd(table - table.mean(0), compute_uv=False)
    return np.square(singular[rank:]).sum() / np.square(table).sum()


def svd_optimum(table, rank):
    """The same without an offset: Eckart and Young."""
    singular = np.linalg.svd(np.asarray(table, "float64"), compute_uv=False)
    return np.square(singular[rank:]).sum() / np.square(singular).sum()


def tied_model(vocabulary=300, width=24, name="tokens"):
    """Look-up, a dense layer, and the tied projection to the vocabulary."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    embedding = keras.layers.ReversibleEmbedding(vocabulary, width, name=name)
    hidden = keras.layers.Dense(width, "tanh", name="body")(embedding(ids))
    return keras.Model(ids, embedding(hidden, reverse=True), name="tied")


def classifier(vocabulary=300, width=24, name="tokens"):
    """An embedding whose mean over a text is classified."""
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(vocabulary, width, name=name),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(2, name="classes"),
        ],
        name="classifier",
    )


def rounded_features(layer, prefix=""):
    """`f(U)` of a layer with a quantization, rounded here: on its levels."""
    codes, center, scales = (
        to_numpy(getattr(layer, prefix + name)).astype("float64")
        for name in ("codes", "center", "scales")
    )
    features = to_numpy(layer.activation(codes))
    bits = int(layer.quantization.removeprefix("int"))
    # Two bits have levels at half steps.
    shift = 0.5 if bits == 2 else 0.0
    lowest = -127 if bits == 8 else -(2 ** (bits - 1))
    integers = np.rint((features - center) / scales - shift)
    integers = np.clip(integers, lowest, 2 ** (bits - 1) - 1)
    return center + scales * (integers + shift)


def basis_and_offset(layer, prefix=""):
    """Of `f(U) W + 1 c`: center and rotation multiplied in, in float64."""

    def get(name):
        return to_floats(getattr(layer, prefix + name)).astype("float64")

    basis = get("basis")
    if hasattr(layer, prefix + "rotation"):
        basis = get("rotation") @ basis
    offset = get("offset") if layer.use_bias else 0.0
    if layer.use_bias and hasattr(layer, prefix + "center"):
        offset = offset - get("center") @ basis
    return basis, offset


# Formats of integers, by name and by whether each row has a scale of its own.
FORMATS = [
    ("int8", False),
    ("int4", True),
    ("int4", False),
    ("int2", True),
    ("int2", False),
]


def stored_columns(rank, quantization, row_scales=True):
    """Columns of codes in a file, where LiteRT takes multiples of some."""
    if quantization == "int4":
        multiple = 32 if row_scales else 2
    elif quantization == "int2":
        rank += row_scales  # the half of a step that its levels are shifted by
        multiple = 4
    else:
        multiple = 1
    return int(np.ceil(rank / multiple)) * multiple


def stored_bytes(
    rank, rows, columns, quantization, use_bias=True, row_scales=True
):
    """Bytes of the arrays that a file holds of a table, one by one."""
    stored = stored_columns(rank, quantization, row_scales)
    if quantization is None:
        arrays = [("f4", rows, rank), ("f4", rank, columns)]
        arrays += [("f4", columns)] * use_bias
        return sum(np.empty(shape, dtype).nbytes for dtype, *shape in arrays)
    per_byte = {"int8": 1, "int4": 2, "int2": 4}[quantization]
    arrays = [("u1", rows, stored // per_byte), ("i1", stored, columns)]
    if quantization == "int8" or not row_scales:
        arrays += [("f4", 1)]
    elif quantization == "int4":
        arrays += [("f2", rows)]
    else:
        arrays += [("f4", rows), ("i8", rows)]
    # The center of the codes needs an offset of its own.
    arrays += [("f4", columns)]
    return sum(np.empty(shape, dtype).nbytes for dtype, *shape in arrays)


def table_with_spectrum(num_rows, values, seed=0):
    """A float64 table of these singular values."""
    rng = np.random.default_rng(seed)
    size = len(values)
    left = np.linalg.qr(rng.normal(size=(num_rows, size)))[0]
    right = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return left * values @ right


def to_floats(x):
    """A tensor or variable of any precision as a float32 NumPy array."""
    return to_numpy(ops.cast(x, "float32"))


def made_once(tmp_path_factory, name, make):
    """A folder that `make(folder)` has filled, one for all test processes.

    Of those that run side by side the first makes it; the others wait.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with filelock.FileLock(root / f"{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder
