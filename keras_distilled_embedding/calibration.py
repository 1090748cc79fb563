"""What `compress` learns from data: token counts and second moments.

Rows and directions of a table that are used more count for more in the error
that the factors minimize.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding._utils.arguments import check_built_model
from keras_distilled_embedding._utils.datasets import iterate_batches
from keras_distilled_embedding._utils.datasets import num_batches
from keras_distilled_embedding._utils.masked_mean import weights_of_tokens
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import check_finite_rows
from keras_distilled_embedding.targets import Target
from keras_distilled_embedding.targets import heads_of
from keras_distilled_embedding.targets import named_tables

_TEXTS_AT_A_TIME = 8  # that the preprocessor is given
# The share of the plain metric beside that of the hidden states, where a table
# looks up too, which wants its entries themselves, and where it only projects:
# a few thousand states do not show every direction.
_TIED_SHARE, _PROJECTION_SHARE = 0.1, 0.02
# Of 512 to as many, each step lost less, the last little (docs/pretrained.md).
CALIBRATION_TOKENS = 16_384


@dataclasses.dataclass(frozen=True, eq=False)
class TableStatistics:
    """How a model uses one of its tables.

    Args:
        token_counts: float64 array `(input_dim,)`, how often each row was
            looked up, or `None` where none was.
        second_moment: float64 array `C = mean(h h^T)` of shape
            `(output_dim, output_dim)`, of the hidden states `h` that were
            projected, or `None` where none was. A change `X` of the table
            changes their logits by `||X C^1/2||^2`, in the mean.
    """

    token_counts: np.ndarray | None
    second_moment: np.ndarray | None


def calibrate(
    model: keras.Model,
    calibration_data: Any,
    *,
    calibration_tokens: int = CALIBRATION_TOKENS,
    verbose: int = 1,
) -> dict[str, TableStatistics]:
    """Collects how a model uses its tables, in one pass over some data.

    `compress` does this with its `calibration_data`. The results are there
    for `factorize` and `DistilledEmbedding.from_embedding`, whose
    `row_weights` and `column_weights` they are.

    Args:
        model: A built model. It runs eagerly and without dropout.
        calibration_data: What the model reads: a finite `tf.data.Dataset`,
            `keras.utils.PyDataset` or list of batches `x`, `(x, y)` or
            `(x, y, sample_weight)`; or a list of texts, for a model with a
            preprocessor. Tokens and hidden states count by their sample
            weights and Keras masks.
        calibration_tokens: Integer, after how many tokens to stop, at the end
            of a batch; of the table that sees most.
        verbose: Whether to show a progress bar, on a terminal.

    Returns:
        `TableStatistics` by layer name, of embeddings and of dense layers
        over a vocabulary; where several layers have one name, of the first.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the data is infinite, empty or no batches, or texts for
            a model without a preprocessor, or if hidden states are not finite.

    Example:

    ```python
    tokens = keras.layers.ReversibleEmbedding(500, 16, name="tokens")
    ids = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Dense(16, "tanh")(tokens(ids))
    model = keras.Model(ids, tokens(hidden, reverse=True))

    batches = [np.random.randint(500, size=(32, 10)) for _ in range(4)]
    statistics = calibrate(model, batches)["tokens"]
    statistics.token_counts.sum()  # 1280
    statistics.second_moment.shape  # (16, 16)
    ```
    """
    check_built_model("model", model)
    limit = as_integer("calibration_tokens", calibration_tokens)
    targets = [t for _, t in named_tables(model) if not t.is_dense]
    targets += [Target(head) for head in heads_of(model, targets)]
    found = collect_statistics(model, targets, calibration_data, limit, verbose)
    by_name: dict[str, TableStatistics] = {}
    for target, statistics in found.items():
        by_name.setdefault(target.name, statistics)
    return by_name


def collect_statistics(
    model: keras.Model,
    targets: Iterable[Target],
    calibration_data: Any,
    calibration_tokens: int,
    verbose: int,
) -> dict[Target, TableStatistics]:
    """Collects what `calibrate` does, for some tables, by table."""
    collectors = {target: _Collector(target) for target in targets}
    batches = _batches(calibration_data)
    num_batches(batches, "calibration_data")
    count = 0
    try:
        for target, collector in collectors.items():
            keras_internals.watch_calls(target.layer, collector.watch)
        for batch in iterate_batches(batches, "Calibrating", verbose):
            x, _, sample_weight = keras.utils.unpack_x_y_sample_weight(
                _preprocessed(model, batch)
            )
            for collector in collectors.values():
                collector.sample_weight = sample_weight
            model(x, training=False)
            count += 1
            seen = max(c.num_tokens for c in collectors.values())
            if seen >= calibration_tokens:
                break
    finally:
        for target in collectors:
            keras_internals.stop_watching(target.layer)
    if count == 0:
        raise ValueError(
            "`calibration_data` must have at least one batch. Received: none"
        )
    return {
        target: collector.statistics()
        for target, collector in collectors.items()
    }


def tables_of(
    model: keras.Model,
    targets: Sequence[Target],
    calibration_data: Any,
    calibration_tokens: int,
    verbose: int,
) -> dict[Target, list[Table]]:
    """The tables of a model, weighted by its data where there is some."""
    statistics = {}
    if calibration_data is not None:
        statistics = collect_statistics(
            model, targets, calibration_data, calibration_tokens, verbose
        )
    return {t: weighted_tables(t, statistics.get(t)) for t in targets}


def weighted_tables(
    target: Target, statistics: TableStatistics | None
) -> list[Table]:
    """The tables of a layer, with the weights of their rows and columns.

    Rows count by their tokens, one more for each so that none is worthless;
    columns by the second moment of what the table projects.
    """
    arrays = target.tables()
    if statistics is None:
        return [_checked(target, array) for array in arrays]
    rows = statistics.token_counts
    if rows is not None:
        rows = rows + 1.0
    columns = statistics.second_moment
    if columns is not None:
        tied = rows is not None and len(arrays) == 1
        share = _TIED_SHARE if tied else _PROJECTION_SHARE
        size = len(columns)
        columns = (1.0 - share) * columns * (size / np.trace(columns))
        columns += share * np.eye(size)
    if len(arrays) == 2:  # the look-up's and the projection's
        return [
            _checked(target, arrays[0], rows),
            _checked(target, arrays[1], None, columns),
        ]
    return [_checked(target, arrays[0], rows, columns)]


def _checked(target: Target, values: np.ndarray, *weights: Any) -> Table:
    """A table that holds finite numbers, or else an error naming its layer."""
    try:
        check_finite_rows(values)
        return Table.of(values, *weights)
    except ValueError as error:
        raise ValueError(f"Layer '{target.name}': {error}") from error


def _batches(data: Any) -> Any:
    """The data as batches: texts are put together, one batch is refused."""
    if isinstance(data, dict) or hasattr(data, "shape"):
        raise ValueError(
            "`calibration_data` must be an iterable of batches. Put a single "
            f"batch into a list. Received: {type(data).__name__}"
        )
    if isinstance(data, str):
        data = [data]
    if isinstance(data, list | tuple) and data and isinstance(data[0], str):
        return [
            list(data[start : start + _TEXTS_AT_A_TIME])
            for start in range(0, len(data), _TEXTS_AT_A_TIME)
        ]
    return data


def _preprocessed(model: keras.Model, batch: Any) -> Any:
    """A batch as the model takes it."""
    leaf = keras.tree.flatten(batch)[0]
    is_text = isinstance(leaf, str | bytes) or "string" in str(
        getattr(leaf, "dtype", "")
    )
    if not is_text:
        return batch
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is None:
        raise ValueError(
            "`calibration_data` may be texts only where the model has a "
            "`preprocessor`; give it batches of what the model is called "
            f"with. Received: texts, for model '{model.name}'"
        )
    return preprocessor(*batch if isinstance(batch, tuple) else [batch])


class _Collector:
    """Adds up what one layer is called with."""

    def __init__(self, target: Target) -> None:
        self.sample_weight: Any = None  # of the batch that runs
        self._target = target
        self._counts: Any = None
        self._moment: Any = None
        self._num_states = 0.0

    @property
    def num_tokens(self) -> float:
        """How many it has seen, by their weights."""
        looked_up = 0.0 if self._counts is None else self._counts.sum()
        return max(self._num_states, looked_up)

    def watch(
        self, outputs: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Is told of each call of the layer."""
        reverse = kwargs.get("reverse", args[0] if args else False)
        if self._target.is_dense or reverse:
            self._add_states(inputs)
        else:
            self._add_tokens(inputs)

    def _add_tokens(self, inputs: Any) -> None:
        if hasattr(inputs, "to_tensor"):  # TensorFlow's ragged tensors
            inputs = inputs.to_tensor(-1)
        ids = ops.convert_to_numpy(ops.cast(inputs, "int32"))
        weights = self._weights_of(inputs, inputs)
        if self._counts is None:
            self._counts = np.zeros(self._target.shape[0])
        size = len(self._counts)
        counted = (ids >= 0) & (ids < size)
        if getattr(self._target.layer, "mask_zero", False):
            counted &= ids != 0
        self._counts += np.bincount(
            ids[counted],
            None if weights is None else weights[counted],
            minlength=size,
        )

    def _add_states(self, inputs: Any) -> None:
        states = ops.convert_to_numpy(ops.cast(inputs, "float32"))
        weights = self._weights_of(inputs[..., 0], inputs)
        if weights is None:
            weights = np.ones(states.shape[:-1])
        states = states.reshape(-1, states.shape[-1]).astype(np.float64)
        weights = weights.reshape(-1)
        # What has no weight may hold anything, NaN too.
        states, weights = states[weights > 0], weights[weights > 0]
        if not np.isfinite(states).all():
            raise ValueError(
                "`model` must have finite hidden states. Received: states "
                f"with NaN or infinity, projected by '{self._target.name}'"
            )
        if self._moment is None:
            self._moment = np.zeros((states.shape[1], states.shape[1]))
        self._moment += (weights[:, np.newaxis] * states).T @ states
        self._num_states += weights.sum()

    def _weights_of(self, values: Any, inputs: Any) -> np.ndarray | None:
        """Returns the weights of tokens, where they fit its inputs."""
        given = self.sample_weight
        if isinstance(given, dict | list | tuple):
            given = None
        if given is not None:
            shape = tuple(ops.shape(given))
            if shape != tuple(ops.shape(values))[: len(shape)]:
                given = None
        weights = weights_of_tokens(ops.cast(values, "float32"), given, inputs)
        return None if weights is None else ops.convert_to_numpy(weights)

    def statistics(self) -> TableStatistics:
        moment = None
        if self._num_states > 0:
            moment = (self._moment + self._moment.T) / (2 * self._num_states)
        counts = self._counts
        return TableStatistics(
            counts if np.any(counts) else None,
            moment if np.any(moment) else None,
        )
