"""Marian's files of weights.

A header counts the tensors; then come their sizes, names and shapes, and from
an aligned place on their values.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

TABLE = "Wemb"
FLOAT32 = 0x404
INTEGERS = 0x4101  # in 8 bits, with their scale behind them
TEXT = 0x101


def read_file(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The settings and the float32 weights of a Marian file, by name.

    Raises:
        ValueError: If a weight is of a type that is not known.
    """
    content = path.read_bytes()
    _, count = struct.unpack_from("<2Q", content)
    headers = np.frombuffer(content, "<u8", 4 * count, 16).reshape(-1, 4)
    offset = 16 + headers.nbytes

    def take(size: int) -> bytes:
        nonlocal offset
        offset += size
        return content[offset - size : offset]

    names = [take(int(size))[:-1].decode() for size in headers[:, 0]]
    shapes = [np.frombuffer(take(4 * int(n)), "<i4") for n in headers[:, 2]]
    take(struct.unpack("<Q", take(8))[0])  # up to where the weights begin
    settings, weights = {}, {}
    for name, shape, (_, kind, _, size) in zip(names, shapes, headers.tolist()):
        data = take(size)
        if name == "special:model.yml":
            lines = data.decode().strip("\0\n").split("\n")
            settings = dict(s.split(": ", 1) for s in lines if ": " in s)
        elif kind != TEXT and "QuantMult" not in name:
            weights[name] = _values(name, kind, shape, data)
    return settings, weights


def _values(name: str, kind: int, shape: np.ndarray, data: bytes) -> np.ndarray:
    size = math.prod(shape.tolist())
    if kind == FLOAT32:
        return np.frombuffer(data, "<f4", size).reshape(shape)
    if kind != INTEGERS:
        raise ValueError(f"`{name}` is of a type that is not known: {kind:#x}")
    (scale,) = struct.unpack_from("<f", data, size)
    values = np.frombuffer(data, "int8", size).astype("float32") / scale
    if name == TABLE:
        return values.reshape(shape)
    return values.reshape(shape[::-1]).T  # lies there transposed
