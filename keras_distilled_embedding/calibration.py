"""What `compress` should know of the data: its tokens, its hidden states.

Rows and directions of a table that are used more count for more in the error
that the factors minimise.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding._utils.datasets import iterate_batches
from keras_distilled_embedding._utils.datasets import num_batches
from keras_distilled_embedding._utils.masked_mean import weights_of_tokens
from keras_distilled_embedding.layers import DistilledEmbedding

# Of a file of ids: lines, or entries of an array, counted at a time.
LINES_AT_A_TIME = 10_000
ENTRIES_AT_A_TIME = 2**22


def count_tokens(
    dataset: Any,
    input_dim: int,
    *,
    select: Callable[..., Any] | None = None,
    padding_id: int | None = None,
    verbose: int = 1,
) -> np.ndarray:
    """Counts how often each token occurs, for `compress` and `factorize`.

    Count tokens as the model meets them, in what it reads and in what it
    predicts, the special ones included: a row that is thought rare is kept
    badly.

    Args:
        dataset: A finite iterable of batches, such as what `fit` is given (a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, a list, ...): every
            integer array in them is counted, ragged ones and those in
            tuples and dictionaries too. Or the path of a tokenised file: ids
            separated by white space, `.gz` or not, or a NumPy `.npy` array of
            ids.
        input_dim: Positive integer, the size of the vocabulary.
        select: Function of the parts of a batch, `x`, `y`, ..., that returns
            what to count of it, where that is not all its integers: labels
            that are not tokens, say.
        padding_id: Integer, an id that is not counted. `None` counts all.
        verbose: Whether to show a progress bar, on a terminal.

    Returns:
        int64 array of shape `(input_dim,)`.

    Raises:
        ValueError: If an id is not below `input_dim`, if there is no token at
            all, if the dataset is infinite or the file has something else
            than ids in it.
        FileNotFoundError: If there is no such file.

    Example:

    >>> batches = [np.array([[1, 2], [1, 0]]), np.array([[1, 3]])]
    >>> count_tokens(batches, 5, padding_id=0)
    array([0, 3, 1, 1, 0])
    """
    input_dim = as_integer("input_dim", input_dim)
    if padding_id is not None:
        padding_id = as_integer("padding_id", padding_id, minimum=0)
    batches = dataset
    if isinstance(dataset, str | os.PathLike):
        batches = _TokenFile(Path(dataset))
    counts = np.zeros(input_dim, np.int64)
    for batch in iterate_batches(batches, "Counting tokens", verbose):
        if select is not None:
            batch = (
                select(*batch) if isinstance(batch, tuple) else select(batch)
            )
        for ids in _integers(batch):
            counts += _count(ids, input_dim)
    if padding_id is not None and padding_id < input_dim:
        counts[padding_id] = 0
    if not counts.any():
        raise ValueError(
            f"`dataset` has no token to count. Received: dataset={dataset!r}"
        )
    return counts


class _TokenFile:
    """Ids of a file, in batches.

    Args:
        path: See `count_tokens`.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                "`dataset` must be batches, or a file of token ids. "
                f"Received: '{path}', which is no file"
            )
        self._path = path

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._array() if self._path.suffix == ".npy" else self._text()

    def _array(self) -> Iterator[np.ndarray]:
        try:
            ids = np.load(self._path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(
                f"`dataset` must be an array of ids. Received: file "
                f"'{self._path}'; NumPy says: {error}"
            ) from error
        if ids.dtype.kind not in "iu":
            raise ValueError(
                "`dataset` must hold integers. Received: file "
                f"'{self._path}' of dtype {ids.dtype}"
            )
        ids = ids.reshape(-1)
        for start in range(0, len(ids), ENTRIES_AT_A_TIME):
            yield ids[start : start + ENTRIES_AT_A_TIME]

    def _text(self) -> Iterator[np.ndarray]:
        opened = gzip.open if self._path.suffix == ".gz" else open
        with opened(self._path, "rt", encoding="utf-8") as lines:
            ids: list[int] = []
            for number, line in enumerate(lines, start=1):
                try:
                    ids += map(int, line.split())
                except ValueError as error:
                    raise ValueError(
                        "`dataset` must be a file of token ids separated by "
                        f"white space. Received: file '{self._path}' with "
                        f"line {number}: {line[:60].rstrip()!r}"
                    ) from error
                if number % LINES_AT_A_TIME == 0:
                    yield np.array(ids, np.int64)
                    ids = []
            yield np.array(ids, np.int64)


def _integers(batch: Any) -> Iterator[np.ndarray]:
    """The integer arrays of a batch, flat."""
    for leaf in keras.tree.flatten(batch):
        # Of ragged tensors, the values of all rows.
        leaf = getattr(leaf, "flat_values", leaf)
        if leaf is None or isinstance(leaf, str | bytes):
            continue
        array = np.asarray(leaf)
        if array.dtype.kind in "iu":
            yield array.reshape(-1)


def _count(ids: np.ndarray, input_dim: int) -> np.ndarray | int:
    if not ids.size:
        return 0
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= input_dim:
        raise ValueError(
            "Token ids must be at least 0 and below the size of the "
            f"vocabulary, input_dim={input_dim}. Received: ids from "
            f"{smallest} to {largest}. Where other integers stand beside the "
            "tokens, pass `select`"
        )
    return np.bincount(ids.astype(np.int64), minlength=input_dim)


def second_moment(
    model: keras.Model,
    dataset: Any,
    layer: str | None = None,
    *,
    verbose: int = 1,
) -> np.ndarray:
    """Second moment of the hidden states that a vocabulary table multiplies.

    The logits of a tied projection are `h E^T`, and of a change `X` of the
    table their squared error is, in the mean over states, `||X C^1/2||^2`
    with `C = mean(h^T h)`. With `C` for its column weights, `factorize` keeps
    the logits rather than the entries of the table. A few batches are enough:
    some ten states for each column.

    Args:
        model: A built model with a projection to the vocabulary. It runs
            eagerly and without dropout.
        dataset: A finite iterable of batches `x`, `(x, y)` or
            `(x, y, sample_weight)`. States count by their sample weights and
            Keras masks.
        layer: Name of the projection: of an embedding that is called with
            `reverse=True`, or of another layer, such as `Dense`. `None` finds
            the one embedding that is called so.
        verbose: Whether to show a progress bar, on a terminal.

    Returns:
        float64 array `C` of shape `(d, d)`, symmetric.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model has no such projection, or several, if
            the dataset is infinite or no state has a positive weight, or if
            states are not finite.

    Example:

    ```python
    tokens = keras.layers.ReversibleEmbedding(500, 16, name="tokens")
    ids = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Dense(16, "tanh")(tokens(ids))
    teacher = keras.Model(ids, tokens(hidden, reverse=True))

    batches = [np.random.randint(500, size=(32, 10)) for _ in range(4)]
    covariance = second_moment(teacher, batches)  # (16, 16)
    student = compress(teacher, 4.0, hidden_covariances=covariance)
    ```
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r}"
        )
    num_batches(dataset)
    if layer is None:
        watched = [
            found
            for found in keras_internals.iterate_layers(model)
            if _is_reversible(found)
        ]
    else:
        watched = [keras_internals.find_layer(model, layer, "model")]
    moments = {found: _Moment() for found in watched}
    try:
        for found, moment in moments.items():
            keras_internals.watch_calls(
                found, moment.watcher(_is_reversible(found))
            )
        for batch in iterate_batches(dataset, "Running the model", verbose):
            x, _, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
            for moment in moments.values():
                moment.sample_weight = sample_weight
            model(x, training=False)
    finally:
        for found in moments:
            keras_internals.stop_watching(found)
    return _the_one_met(moments, layer).mean()


class _Moment:
    """The second moment of what a layer is called with.

    Attributes:
        sample_weight: Of the batch that runs.
    """

    def __init__(self) -> None:
        self.sample_weight: Any = None
        self.num_calls = 0
        self._sum: Any = 0.0
        self._weight = 0.0

    def watcher(self, only_reverse: bool) -> Callable[..., None]:
        """What is told of the layer's calls."""

        def keep(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> None:
            reverse = kwargs.get("reverse", args[0] if args else False)
            if reverse or not only_reverse:
                self._add(inputs)

        return keep

    def _add(self, inputs: Any) -> None:
        self.num_calls += 1
        values = inputs[..., 0]
        weights = weights_of_tokens(values, self.sample_weight, inputs)
        states = ops.convert_to_numpy(ops.cast(inputs, "float32"))
        states = states.reshape(-1, states.shape[-1]).astype(np.float64)
        if weights is None:
            weights = np.ones(len(states))
        else:
            weights = ops.convert_to_numpy(weights).reshape(-1)
        # What has no weight may hold anything, NaN too.
        states, weights = states[weights > 0], weights[weights > 0]
        if not np.isfinite(states).all():
            raise ValueError(
                "`model` must have finite hidden states. Received: states "
                f"with NaN or infinity, in {self.num_calls} batches"
            )
        self._sum += (weights[:, np.newaxis] * states).T @ states
        self._weight += weights.sum()

    def mean(self) -> np.ndarray:
        if self._weight == 0:
            raise ValueError(
                "`dataset` must have states of a positive weight. Received: "
                f"{self.num_calls} batches without any"
            )
        return (self._sum + self._sum.T) / (2 * self._weight)


def _is_reversible(layer: keras.layers.Layer) -> bool:
    kinds = keras.layers.ReversibleEmbedding, DistilledEmbedding
    return isinstance(layer, kinds)


def _the_one_met(
    moments: dict[keras.layers.Layer, _Moment], name: str | None
) -> _Moment:
    met = [found for found in moments if moments[found].num_calls]
    if len(met) == 1:
        return moments[met[0]]
    if name is not None:
        raise ValueError(
            "`layer` must name a layer that projects hidden states: an "
            "embedding must be called with `reverse=True`. Received: "
            f"layer='{name}', which was not"
        )
    raise ValueError(
        "`model` must have one embedding that is called with `reverse=True`, "
        "or `layer` must name the projection. Received: "
        + (
            f"several: {[found.name for found in met]}"
            if met
            else "a model without any, or no batch"
        )
    )
