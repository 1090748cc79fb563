"""Residual vector quantization in groups, and CARVQ, which corrects it.

Gou et al., 2025 (arXiv 2510.12721, Findings of EMNLP): the columns are split
into groups of 8. A sub-vector of a group is the sum of one entry of each of
the group's codebooks, which are fitted by k-means one after the other, each to
what those before it leave over. A codebook has 16 entries of 16 bits, so that
its codes take 4 bits, packed two in a byte. CARVQ adds what a small network
makes of a few numbers of each token (its corrective adaptor), in 16 bits too,
trained towards what the codes have lost. For the look-up only: a projection
has to make the whole table first.

The paper's sizes are of wider models. Assumed here, after its 1.6 bits a
parameter (three codebooks, and 16 numbers a token of 2,048 columns): the
numbers of a token take a thirteenth of the bytes, the network has one hidden
layer 16 times as wide, with GELU, and is trained by Adam on the squared error.
Other than in the paper, groups may have different numbers of codebooks, so
that any number of bytes is used up: the next one goes to the group that has
lost most.
"""

import keras
import numpy as np
from keras import ops

from benchmarks.methods.rival import Rival

WIDTH = 8
NUM_CENTROIDS = 16
SAMPLE, ROUNDS = 4_096, 15
ADAPTOR_SHARE = 13
HIDDEN = 16
EPOCHS, BATCH = 30, 1024


def fit(table, weights, budget):
    rows, columns = table.shape
    num_groups = -(-columns // WIDTH)
    left = np.zeros((num_groups * WIDTH, rows), "float32")
    left[:columns] = table.T
    left = left.reshape(num_groups, WIDTH, rows).transpose(0, 2, 1).copy()
    # Codes of two rows a byte, a codebook, and the number of its group.
    codebook_bytes = (rows + 1) // 2 + 2 * NUM_CENTROIDS * WIDTH + 2
    number = int(budget // codebook_bytes)
    if number < 1:
        return None
    lost = np.square(left).sum(axis=(1, 2))
    groups = np.empty(number, "uint16")
    books = np.empty((number, NUM_CENTROIDS, WIDTH), "float16")
    codes = np.zeros((number, rows + rows % 2), "uint8")
    for i in range(number):
        groups[i] = group = lost.argmax()
        books[i], codes[i, :rows] = _k_means(left[group], seed=i)
        left[group] -= books[i].astype("float32")[codes[i, :rows]]
        lost[group] = np.square(left[group]).sum()
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return {"groups": groups, "codes": packed, "codebooks": books}


def _k_means(values, seed):
    """Centroids by Lloyd's rounds on a sample, and the nearest of each row."""
    random = np.random.default_rng(seed)
    sample = random.permutation(values)[:SAMPLE]
    means = np.resize(sample, (NUM_CENTROIDS, WIDTH))
    for _ in range(ROUNDS):
        members = _nearest(sample, means) == np.arange(NUM_CENTROIDS)[:, None]
        sizes = members.sum(axis=1, keepdims=True)
        sums = members.astype("float32") @ sample
        means = np.where(sizes, sums / np.maximum(sizes, 1), means)
    means = means.astype("float16")
    return means, _nearest(values, means.astype("float32"))


def _nearest(values, means):
    return (values @ means.T - np.square(means).sum(axis=1) / 2).argmax(axis=1)


def rebuild(arrays, shape):
    packed = arrays["codes"]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).astype("int32")
    codes = codes.reshape(len(packed), -1)[:, : shape[0]]
    sums = [ops.zeros((shape[0], WIDTH))] * -(-shape[1] // WIDTH)
    for i, group in enumerate(arrays["groups"]):
        entries = ops.take(arrays["codebooks"][i], codes[i], axis=0)
        sums[group] = sums[group] + entries
    return ops.concatenate(sums, axis=1)[:, : shape[1]]


def fit_corrected(table, weights, budget):
    rows, columns = table.shape
    size = max(1, round(budget / ADAPTOR_SHARE / (2 * rows)))
    hidden = HIDDEN * size
    network = size * hidden + hidden * columns + hidden + columns
    arrays = fit(table, weights, budget - 2 * (rows * size + network))
    if arrays is None:
        return None
    floats = arrays | {"codebooks": arrays["codebooks"].astype("float32")}
    lost = table - ops.convert_to_numpy(rebuild(floats, table.shape))
    keras.utils.set_random_seed(0)
    unit = float(lost.std()) or 1.0
    adaptor = keras.Sequential(
        [
            keras.Input((), dtype="int32"),
            keras.layers.Embedding(rows, size, "random_normal"),
            keras.layers.Dense(hidden, "gelu"),
            keras.layers.Dense(columns),
        ]
    )
    steps = EPOCHS * -(-rows // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(0.01, steps)
    adaptor.compile(keras.optimizers.Adam(rate), "mse")
    adaptor.fit(np.arange(rows), lost / unit, BATCH, EPOCHS, verbose=0)
    names = "tokens", "kernel_0", "bias_0", "kernel_1", "bias_1"
    trained = dict(zip(names, adaptor.get_weights(), strict=True))
    for name in ("kernel_1", "bias_1"):
        trained[name] = trained[name] * unit
    return arrays | {n: value.astype("float16") for n, value in trained.items()}


def rebuild_corrected(arrays, shape):
    hidden = ops.matmul(arrays["tokens"], arrays["kernel_0"])
    hidden = ops.gelu(hidden + arrays["bias_0"])
    correction = ops.matmul(hidden, arrays["kernel_1"]) + arrays["bias_1"]
    return rebuild(arrays, shape) + correction


Rival("residual quantization", fit, rebuild)
Rival("CARVQ", fit_corrected, rebuild_corrected)
