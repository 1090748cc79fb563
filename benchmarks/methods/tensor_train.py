"""Tensor-Train: three cores, from TT-SVD.

Khrulkov et al., 2019 (arXiv 1901.10787). Rows and columns are split into three
factors each.
"""

import math

import numpy as np
from keras import ops

from benchmarks.methods.rival import Rival


def fit(table, weights, budget):
    dims = _dims(table.shape)
    rows = math.prod(dims[::2])
    padded = np.zeros((rows, table.shape[1]), "float32")
    padded[: len(table)] = table
    tensor = padded.reshape(*dims[::2], *dims[1::2])
    tensor = tensor.transpose(0, 3, 1, 4, 2, 5)
    sizes = [v * d for v, d in zip(dims[::2], dims[1::2])]
    unfolded = tensor.reshape(sizes[0], -1)
    first, energies = _left_vectors(unfolded)

    def core_after(rank):
        core = first[:, :rank].T @ unfolded
        return core.reshape(rank * sizes[1], sizes[2])

    best = None
    for rank in range(1, sizes[0] + 1):
        # The second rank that the first one leaves room for.
        free = budget / 4 - sizes[0] * rank
        second = int(free // (rank * sizes[1] + sizes[2]))
        second = min(second, rank * sizes[1], sizes[2])
        if second < 1:
            continue
        core = core_after(rank)
        values = np.linalg.eigvalsh(core.T @ core.astype("float64"))[::-1]
        error = energies[rank:].sum() + values[second:].sum()
        if best is None or error < best[0]:
            best = error, rank, second
    if best is None:
        return None
    _, rank, second = best
    core = core_after(rank)
    directions = _left_vectors(core.T)[0][:, :second]
    return {
        "first": first[:, :rank],
        "second": core @ directions,
        "third": directions.T,
    }


def rebuild(arrays, shape):
    first, second, third = (arrays[n] for n in ("first", "second", "third"))
    rest = ops.reshape(ops.matmul(second, third), (first.shape[1], -1))
    tensor = ops.reshape(ops.matmul(first, rest), _dims(shape))
    tensor = ops.transpose(tensor, (0, 2, 4, 1, 3, 5))
    return ops.reshape(tensor, (-1, shape[1]))[: shape[0]]


def _left_vectors(matrix):
    """Left singular vectors of a wide matrix, and squared values."""
    energies, vectors = np.linalg.eigh((matrix @ matrix.T).astype("float64"))
    return vectors[:, ::-1].astype("float32"), energies[::-1]


def _dims(shape):
    """Factors of the rows and of the columns, in turn."""
    root = math.ceil(shape[0] ** (1 / 3))
    second = math.ceil(math.sqrt(shape[0] / root))
    rows = root, second, math.ceil(shape[0] / root / second)
    return [n for pair in zip(rows, _three_factors(shape[1])) for n in pair]


def _three_factors(number):
    """The three factors of a number that are the nearest to each other."""
    triples = [
        (a, b, number // a // b)
        for a in range(1, number + 1)
        if number % a == 0
        for b in range(1, number // a + 1)
        if number // a % b == 0
    ]
    return min(triples, key=lambda triple: (max(triple), triple))


Rival("Tensor-Train", fit, rebuild)
