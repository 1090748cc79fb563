"""Product quantization: k-means codes, a byte for each group of columns.

Jegou et al., 2011. The codes stay as they are, the codebooks are trained.
"""

import numpy as np
from keras import ops

from benchmarks.methods.rival import Rival

NUM_CENTROIDS = 256
ROUNDS = 25


def fit(table, weights, budget):
    from sklearn.cluster import MiniBatchKMeans

    rows, columns = table.shape
    codebook_bytes = 4 * NUM_CENTROIDS * columns
    fitting = [
        parts
        for parts in range(1, columns + 1)
        if columns % parts == 0 and rows * parts + codebook_bytes <= budget
    ]
    if not fitting:
        return None
    means = [
        MiniBatchKMeans(
            NUM_CENTROIDS,
            batch_size=4096,
            max_iter=ROUNDS,
            n_init=1,
            random_state=0,
        ).fit(part)
        for part in np.split(table, fitting[-1], axis=1)
    ]
    books = [each.cluster_centers_.astype("float32") for each in means]
    return {
        "codes": np.stack([each.labels_ for each in means]).astype("uint8"),
        "codebooks": np.concatenate(books, axis=1),
    }


def rebuild(arrays, shape):
    codes = arrays["codes"].astype("int32")
    books = ops.split(arrays["codebooks"], len(codes), axis=1)
    parts = [ops.take(book, code, axis=0) for book, code in zip(books, codes)]
    return ops.concatenate(parts, axis=1)


Rival("product quantization", fit, rebuild)
