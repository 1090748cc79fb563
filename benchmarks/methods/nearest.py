"""The rival of few bits: each number of a table at its nearest level."""

from __future__ import annotations

import numpy as np

from keras_distilled_embedding.quantization import format_of

# Scales that are tried, relative to what suits Gaussian numbers.
RELATIVE_SCALES = np.geomspace(0.6, 2.5, 12)
SCALE_BYTES = 2


def round_to_nearest(
    table: np.ndarray, quantization: str, block: int | None = None
) -> tuple[np.ndarray, int]:
    """Rounds a table, of twelve scales with the one that loses least.

    Args:
        table: Float32 `(rows, columns)`.
        quantization: The name of a format, whose levels these are.
        block: How many numbers of a row share a scale, a float16; all by
            default.

    Returns:
        The rounded table, and the bytes of its integers and scales.
    """
    kind = format_of(quantization)
    blocks = table.reshape(-1, block or table.shape[1])
    plain = kind.step * np.sqrt(np.square(blocks).mean(axis=1, keepdims=True))
    best = np.zeros_like(blocks)
    least = np.full(len(blocks), np.inf)
    for relative in RELATIVE_SCALES:
        scales = np.maximum(relative * plain, 1e-7)
        scales = scales.astype("float16").astype("float32")
        scales = np.maximum(scales, 6e-8)  # float16's smallest
        levels = np.rint(blocks / scales - kind.shift)
        rounded = (np.clip(levels, *kind.levels) + kind.shift) * scales
        rounded = rounded.astype("float32")
        loss = np.square(rounded - blocks).sum(axis=1)
        better = loss < least
        best[better], least[better] = rounded[better], loss[better]
    number = table.size * kind.bits // 8 + SCALE_BYTES * len(blocks)
    return best.reshape(table.shape), number
