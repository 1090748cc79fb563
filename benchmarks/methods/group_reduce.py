"""GroupReduce: a weighted SVD for each group of tokens.

Chen et al., 2018 (arXiv 1806.06950). Tokens are grouped by frequency, a
group's rank is proportional to its mean frequency, and tokens then move to the
group that keeps them best.
"""

import numpy as np
from keras import ops

from benchmarks.methods.rival import Rival

NUM_GROUPS = 5
NUM_REFINEMENTS = 3


def fit(table, weights, budget):
    groups = _groups_by_frequency(weights)
    ranks = _group_ranks(table.shape, groups, weights, budget)
    if ranks is None:
        return None
    best = None
    for _ in range(NUM_REFINEMENTS + 1):
        sizes = np.bincount(groups, minlength=len(ranks))
        numbers = int((ranks * (sizes + table.shape[1])).sum())
        bases = [
            _weighted_basis(table[groups == g], weights[groups == g], rank)
            for g, rank in enumerate(ranks)
        ]
        lost = np.array(
            [np.square(table - table @ b @ b.T).sum(axis=1) for b in bases]
        )
        error = weights @ np.take_along_axis(lost, groups[None], axis=0)[0]
        # A byte names the group of a token.
        fits = 4 * numbers + len(table) <= budget
        if fits and (best is None or error < best[0]):
            best = error, groups, bases
        # A move to a higher rank costs bytes: only as many as there is room.
        room = (budget - len(table)) / 4 - numbers
        groups = _reassign(groups, lost, ranks, weights, room)
    _, groups, bases = best
    arrays = {"groups": groups.astype("uint8")}
    for g, basis in enumerate(bases):
        arrays[f"codes_{g}"] = table[groups == g] @ basis
        arrays[f"basis_{g}"] = np.ascontiguousarray(basis.T)
    return arrays


def rebuild(arrays, shape):
    groups = arrays["groups"]
    parts = [
        ops.matmul(arrays[f"codes_{g}"], arrays[f"basis_{g}"])
        for g in range(groups.max() + 1)
    ]
    # From rows in the order of the groups to those of the vocabulary.
    places = np.argsort(np.argsort(groups, kind="stable")).astype("int32")
    return ops.take(ops.concatenate(parts), places, axis=0)


def _groups_by_frequency(weights):
    """As many occurrences in each: few frequent tokens, many rare ones."""
    order = np.argsort(-weights, kind="stable")
    mass = np.cumsum(weights[order]) / weights.sum()
    groups = np.empty(len(weights), "int64")
    groups[order] = np.minimum((mass * NUM_GROUPS).astype(int), NUM_GROUPS - 1)
    return np.unique(groups, return_inverse=True)[1]


def _group_ranks(shape, groups, weights, budget):
    """Ranks proportional to the mean frequencies, within the budget."""
    sizes = np.bincount(groups)
    means = np.bincount(groups, weights) / sizes
    most = np.minimum(sizes, shape[1])
    numbers = (budget - shape[0]) / 4

    def ranks_of(scale):
        return np.clip((scale * means).astype(int), 1, most)

    def rest_of(ranks):
        return numbers - (ranks * (sizes + shape[1])).sum()

    if rest_of(ranks_of(0.0)) < 0:
        return None
    low, high = 0.0, shape[1] / means.min()
    for _ in range(60):
        middle = (low + high) / 2
        fits = rest_of(ranks_of(middle)) >= 0
        low, high = (middle, high) if fits else (low, middle)
    ranks = ranks_of(low)
    # What is left goes to the largest group, whose steps are the coarsest.
    for g in np.argsort(-sizes):
        more = int(rest_of(ranks) // (sizes[g] + shape[1]))
        ranks[g] += min(more, most[g] - ranks[g])
    return ranks


def _weighted_basis(rows, weights, rank):
    gram = (weights[:, None] * rows).T @ rows.astype("float64")
    _, directions = np.linalg.eigh(gram)
    return directions[:, ::-1][:, :rank].astype("float32")


def _reassign(groups, lost, ranks, weights, room):
    """Moves tokens to the groups that keep them best, as far as room goes."""
    groups, rows = groups.copy(), np.arange(len(groups))
    target = lost.argmin(axis=0)
    gain = weights * (lost[groups, rows] - lost[target, rows])
    costs = ranks[target] - ranks[groups]
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


Rival("GroupReduce", fit, rebuild)
