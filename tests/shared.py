"""What several test files need: models, references in NumPy, matchers."""

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


def stored_bytes(rank, rows, columns, quantization, use_bias=True):
    """Bytes of the arrays that a file holds of a table, one by one."""
    if quantization is None:
        arrays = [("f4", rows, rank), ("f4", rank, columns)]
        arrays += [("f4", columns)] * use_bias
    elif quantization == "int8":
        arrays = [("i1", rows, rank), ("f4", 1), ("i1", rank, columns)]
        arrays += [("f4", columns)]
    else:
        blocks = -(-rank // 32)
        arrays = [("u1", rows, 16 * blocks), ("f2", rows, blocks)]
        arrays += [("i1", 32 * blocks, columns), ("f4", columns)]
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
