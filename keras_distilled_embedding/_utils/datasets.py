"""Datasets of any kind that Keras trains on, read once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import keras

from keras_distilled_embedding._utils.progress import make_progress


def num_batches(dataset: Any, name: str = "dataset") -> int | None:
    """Returns the number of batches, or `None` where it is not known yet.

    Refuses, by its `name`, what is infinite or nothing to iterate over.
    """
    total: Any = None
    if isinstance(dataset, keras.utils.PyDataset):
        total = math.inf if dataset.num_batches is None else len(dataset)
    elif hasattr(dataset, "cardinality"):  # tf.data: -1 infinite, -2 unknown
        total = int(dataset.cardinality())
        total = {-1: math.inf, -2: None}.get(total, total)
    elif hasattr(dataset, "__len__"):
        total = len(dataset)
    elif not hasattr(dataset, "__iter__"):
        raise ValueError(
            f"`{name}` must be an iterable of batches. Received: {dataset!r}"
        )
    if total == math.inf:
        raise ValueError(
            f"`{name}` must be finite: one epoch, without `repeat()`. "
            f"Received: {dataset!r}"
        )
    return total


def iterate_batches(
    dataset: Any, description: str, verbose: int | bool
) -> Iterator[Any]:
    """Yields the batches, with a progress bar on a terminal."""
    total = num_batches(dataset)
    if not hasattr(dataset, "__iter__"):
        dataset = (dataset[i] for i in range(len(dataset)))
    with make_progress(verbose) as progress:
        yield from progress.track(dataset, total, description=description)
