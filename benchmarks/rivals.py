"""Other ways to make a table smaller, at the same bytes. Baselines only.

Each takes a table, the weights of its rows and a budget of bytes, and returns
what it makes of the table: the largest there is within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field

import numpy as np

FLOAT = 4  # bytes
# GroupReduce: blocks of tokens alike in frequency, rounds of reassignment.
NUM_GROUPS = 5
NUM_REFINEMENTS = 3
NUM_CENTROIDS = 256
KMEANS_ROUNDS = 25
# Of int4: entries with one float16 scale, and the clips tried for it.
BLOCK = 32
CLIPS = (1.0, 0.9, 0.8, 0.7)


@dataclass(frozen=True, eq=False)
class Approximation:
    """What a method makes of a table.

    Args:
        values: Float32, of the table's shape.
        num_bytes: What must be stored.
        details: For the report.
        parts: The arrays that are stored, for those who train them on.
    """

    values: np.ndarray
    num_bytes: int
    details: dict[str, object] = field(default_factory=dict)
    parts: dict[str, object] = field(default_factory=dict)


def truncated_svd(table: np.ndarray, rank: int) -> Approximation:
    """NumPy's decomposition, the optimum of its rank (Eckart and Young)."""
    left, values, right = np.linalg.svd(table, full_matrices=False)
    factors = left[:, :rank] * values[:rank], right[:rank]
    size = sum(factor.size for factor in factors)
    return Approximation(factors[0] @ factors[1], FLOAT * size, {"rank": rank})


def group_reduce(
    table: np.ndarray, weights: np.ndarray, budget: int
) -> Approximation | None:
    """Chen et al., 2018 (arXiv 1806.06950): a weighted SVD for each group.

    Tokens are grouped by frequency, a group's rank is proportional to its
    mean frequency, and tokens then move to the group that keeps them best.
    """
    order = np.argsort(-weights, kind="stable")
    groups = np.empty(len(table), np.int64)
    # As many occurrences in each: few frequent tokens, many rare ones.
    mass = np.cumsum(weights[order]) / weights.sum()
    groups[order] = np.minimum((mass * NUM_GROUPS).astype(int), NUM_GROUPS - 1)
    groups = np.unique(groups, return_inverse=True)[1]
    ranks = _group_ranks(table.shape, groups, weights, budget)
    if ranks is None:
        return None
    best = None
    for _ in range(NUM_REFINEMENTS + 1):
        size = sum(
            rank * (int((groups == g).sum()) + table.shape[1])
            for g, rank in enumerate(ranks)
        )
        bases = [
            _weighted_basis(table[groups == g], weights[groups == g], rank)
            for g, rank in enumerate(ranks)
        ]
        projections = [table @ basis @ basis.T for basis in bases]
        values = np.choose(groups[:, np.newaxis], projections)
        num_bytes = FLOAT * size + len(table)  # a byte names the group
        error = weights @ np.square(table - values).sum(axis=1)
        if num_bytes <= budget and (best is None or error < best[0]):
            best = error, values, num_bytes, groups, bases
        lost = [np.square(table - p).sum(axis=1) for p in projections]
        # A move to a higher rank costs bytes: only as many as there is room.
        groups = _reassign(groups, np.array(lost), ranks, weights, budget, size)
    _, values, num_bytes, groups, bases = best
    codes = [table[groups == g] @ basis for g, basis in enumerate(bases)]
    return Approximation(
        values,
        num_bytes,
        {"ranks": ranks},
        {"groups": groups, "codes": codes, "bases": [b.T for b in bases]},
    )


def _group_ranks(
    shape: tuple[int, int],
    groups: np.ndarray,
    weights: np.ndarray,
    budget: int,
) -> list[int] | None:
    """Ranks proportional to the mean frequencies, within the budget."""
    sizes = np.bincount(groups)
    means = np.bincount(groups, weights) / sizes
    parameters = (budget - shape[0]) / FLOAT

    def ranks_of(scale: float) -> np.ndarray:
        most = np.minimum(sizes, shape[1])
        return np.clip((scale * means).astype(int), 1, most)

    def fits(scale: float) -> bool:
        return (ranks_of(scale) * (sizes + shape[1])).sum() <= parameters

    if not fits(0.0):
        return None
    low, high = 0.0, shape[1] / means.min()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    ranks = ranks_of(low)
    # What is left goes to the largest group, whose steps are the coarsest.
    rest = parameters - (ranks * (sizes + shape[1])).sum()
    for g in np.argsort(-sizes):
        ranks[g] += min(
            int(rest // (sizes[g] + shape[1])),
            min(sizes[g], shape[1]) - ranks[g],
        )
        rest = parameters - (ranks * (sizes + shape[1])).sum()
    return ranks.tolist()


def _weighted_basis(
    rows: np.ndarray, weights: np.ndarray, rank: int
) -> np.ndarray:
    gram = (weights[:, np.newaxis] * rows).T @ rows.astype(np.float64)
    _, directions = np.linalg.eigh(gram)
    return directions[:, ::-1][:, :rank].astype(np.float32)


def _reassign(
    groups: np.ndarray,
    lost: np.ndarray,
    ranks: list[int],
    weights: np.ndarray,
    budget: int,
    size: int,
) -> np.ndarray:
    groups = groups.copy()
    room = (budget - len(groups)) / FLOAT - size
    rows = np.arange(len(groups))
    target = lost.argmin(axis=0)
    gain = weights * (lost[groups, rows] - lost[target, rows])
    costs = np.array(ranks)[target] - np.array(ranks)[groups]
    # Moves that free bytes first, then the best for their bytes.
    worth = gain / np.maximum(costs, 1e-9)
    sizes = np.bincount(groups, minlength=len(ranks))
    for row in np.lexsort((-worth, costs > 0)):
        old, new = groups[row], target[row]
        # A group keeps at least as many rows as it has directions.
        if gain[row] > 0 and costs[row] <= room and sizes[old] > ranks[old]:
            groups[row] = new
            sizes[old] -= 1
            sizes[new] += 1
            room -= costs[row]
    return groups


def tensor_train(
    table: np.ndarray, weights: np.ndarray, budget: int
) -> Approximation | None:
    """Khrulkov et al., 2019 (arXiv 1901.10787), decomposed by TT-SVD.

    Rows and columns are split into three factors each; the ranks are those
    of one relative threshold for both cuts.
    """
    del weights
    row_factors = _three_factors(len(table), exact=False)
    column_factors = _three_factors(table.shape[1], exact=True)
    padded = np.zeros((math.prod(row_factors), table.shape[1]), np.float32)
    padded[: len(table)] = table
    tensor = padded.reshape(*row_factors, *column_factors)
    tensor = tensor.transpose(0, 3, 1, 4, 2, 5)
    sizes = [v * d for v, d in zip(row_factors, column_factors)]
    first, energies = _left_vectors(tensor.reshape(sizes[0], -1))
    best = None
    for rank in range(1, sizes[0] + 1):
        # The second rank that the first one leaves room for.
        free = budget / FLOAT - sizes[0] * rank
        second = int(free // (rank * sizes[1] + sizes[2]))
        second = min(second, rank * sizes[1], sizes[2])
        if second < 1:
            continue
        core = first[:, :rank].T @ tensor.reshape(sizes[0], -1)
        core = core.reshape(rank * sizes[1], sizes[2])
        values = np.linalg.eigvalsh(core.T @ core.astype(np.float64))[::-1]
        error = energies[rank:].sum() + values[second:].sum()
        if best is None or error < best[0]:
            best = error, rank, second
    if best is None:
        return None
    _, rank, second = best
    core = first[:, :rank].T @ tensor.reshape(sizes[0], -1)
    core = core.reshape(rank * sizes[1], sizes[2])
    directions = _left_vectors(core.T)[0][:, :second]
    cores = [first[:, :rank], core @ directions, directions.T]
    tensor = cores[0] @ (cores[1] @ cores[2]).reshape(rank, -1)
    dims = [n for pair in zip(row_factors, column_factors) for n in pair]
    values = tensor.reshape(dims).transpose(0, 2, 4, 1, 3, 5)
    return Approximation(
        values.reshape(padded.shape)[: len(table)],
        FLOAT * sum(core.size for core in cores),
        {"ranks": [rank, second]},
        {"cores": cores, "dims": dims},
    )


def _left_vectors(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors of a wide matrix, and squared values."""
    energies, vectors = np.linalg.eigh((matrix @ matrix.T).astype(np.float64))
    return vectors[:, ::-1].astype(np.float32), energies[::-1]


def _three_factors(number: int, exact: bool) -> tuple[int, int, int]:
    """Three factors near each other, of `number` or of a little more."""
    root = math.ceil(number ** (1 / 3))
    if not exact:
        second = math.ceil(math.sqrt(number / root))
        return root, second, math.ceil(number / root / second)
    triples = [
        (a, b, number // a // b)
        for a in range(1, number + 1)
        if number % a == 0
        for b in range(1, number // a + 1)
        if number // a % b == 0
    ]
    return min(triples, key=lambda triple: (max(triple), triple))


def product_quantization(
    table: np.ndarray, weights: np.ndarray, budget: int
) -> Approximation | None:
    """Jegou et al., 2011: k-means codes, a byte for each group of columns."""
    del weights
    from sklearn.cluster import MiniBatchKMeans

    num_rows, num_columns = table.shape
    codebooks = FLOAT * NUM_CENTROIDS * num_columns
    fitting = [
        parts
        for parts in range(1, num_columns + 1)
        if num_columns % parts == 0 and num_rows * parts + codebooks <= budget
    ]
    if not fitting:
        return None
    parts = fitting[-1]
    codes, codebooks_of = [], []
    for columns in np.split(table, parts, axis=1):
        means = MiniBatchKMeans(
            NUM_CENTROIDS,
            batch_size=4096,
            max_iter=KMEANS_ROUNDS,
            n_init=1,
            random_state=0,
        ).fit(columns)
        codes.append(means.predict(columns))
        codebooks_of.append(means.cluster_centers_.astype(np.float32))
    values = [book[code] for book, code in zip(codebooks_of, codes)]
    return Approximation(
        np.concatenate(values, axis=1),
        num_rows * parts + codebooks,
        {"parts": parts},
        {"codes": codes, "codebooks": codebooks_of},
    )


def int8(table: np.ndarray) -> Approximation:
    """Eight bits an entry, a float32 scale for each row."""
    scales = np.abs(table).max(axis=1, keepdims=True) / 127 + 1e-30
    values = np.round(table / scales) * scales
    return Approximation(
        values.astype(np.float32), table.size + FLOAT * len(table)
    )


def int4(table: np.ndarray) -> Approximation:
    """Four bits an entry, a float16 scale for every block of 32."""
    shape = table.shape
    blocks = table.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    best = np.full((len(blocks), 1), np.inf)
    values = np.zeros_like(blocks)
    for clip in CLIPS:
        scales = (clip * largest / 7 + 1e-30).astype(np.float16)
        scales = scales.astype(np.float32) + 1e-30
        rounded = np.clip(np.round(blocks / scales), -8, 7) * scales
        error = np.square(rounded - blocks).sum(axis=1, keepdims=True)
        values = np.where(error < best, rounded, values)
        best = np.minimum(best, error)
    return Approximation(
        values.reshape(shape).astype(np.float32),
        table.size // 2 + 2 * len(blocks),
    )


Rival = Callable[[np.ndarray, np.ndarray, int], Approximation | None]
BUDGETED: dict[str, Rival] = {
    "GroupReduce": group_reduce,
    "Tensor-Train (TT-SVD)": tensor_train,
    "product quantisation": product_quantization,
}
FIXED = {"int8": int8, "int4": int4}
