"""The distance of the student's tables from its teacher's."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.distillation import DistillationLoss

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_optional_integer
from keras_distilled_embedding._utils.masked_mean import mean
from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class EmbeddingDistillation(DistillationLoss):
    """Squared distance between the teacher's tables and the student's.

    For every `layers.DistilledEmbedding` of the student, and the embedding of
    the same name in the teacher (the first, second, ... of that name, where
    nested models each have one), the mean over the rows of the table

    ```
    1/V sum_i ||E_i - E~_i||^2        E (V, d): the teacher's, fixed
    ```

    and the sum of these over the layers; an untied layer counts both of its
    tables. With row weights `w` the mean is `sum_i w_i ||.||^2 / sum_i w_i`.
    The teacher itself is not run for this loss.

    Args:
        num_rows: Integer or `None`. How many rows, drawn anew at every step,
            stand for all of them: the mean over them is an unbiased estimate.
            `None` uses all rows, which costs about `rank / output_dim` of
            what projecting a batch of `V` tokens costs.
        seed: Integer, seed of the draws.
        row_weights: Array `(V,)` of numbers of at least zero, such as token
            frequencies: how much each row counts. A dictionary gives each
            layer its own, by the layer's name; layers that it leaves out
            weigh their rows equally, as all do by default.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    distiller = Distiller(teacher, student, [EmbeddingDistillation()])
    ```

    References:
    - [Lioutas et al., 2019](https://arxiv.org/abs/1910.06720), equation of
      the second stage.
    """

    needs_teacher_outputs = False

    def __init__(
        self,
        num_rows: int | None = None,
        seed: int = 0,
        row_weights: Any = None,
    ) -> None:
        self.num_rows = as_optional_integer("num_rows", num_rows)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.row_weights = row_weights
        # By layer name; the one of `None` is every other layer's.
        if not isinstance(row_weights, dict):
            row_weights = {} if row_weights is None else {None: row_weights}
        self._row_weights = {
            name: _mean_one(weights) for name, weights in row_weights.items()
        }

    def validate_model_compatibility(
        self, teacher: keras.Model, student: keras.Model
    ) -> None:
        """Refuses models whose tables cannot be paired, or weighted.

        Raises:
            ValueError: If the student has no `DistilledEmbedding`, or the
                teacher no float embedding of that name and shape, or if
                `row_weights` fits no table.
        """
        layers = [layer for _, layer in paired_embeddings(teacher, student)]
        names = {layer.name for layer in layers}
        unknown = set(self._row_weights) - names - {None}
        if unknown:
            raise ValueError(
                "`row_weights` must be given by names of the student's "
                f"DistilledEmbedding layers, {sorted(names)}. "
                f"Received: {sorted(unknown)}"
            )
        for layer in layers:
            weights = self._weights_of(layer)
            if weights is not None and len(weights) != layer.input_dim:
                raise ValueError(
                    "`row_weights` must hold one number for each row of the "
                    f"layer '{layer.name}', {layer.input_dim}. "
                    f"Received: {len(weights)} numbers"
                )

    def compute_loss(
        self,
        teacher_outputs: Any,
        student_outputs: Any,
        *,
        teacher: keras.Model,
        student: keras.Model,
        **kwargs: Any,
    ) -> Any:
        """Computes the loss from the models' tables; outputs are not used."""
        losses = []
        for old, new in paired_embeddings(teacher, student):
            losses.append(self._distance(_table(old), new))
            if not new.tie_weights:
                kernel = ops.transpose(_reverse_kernel(old))
                losses.append(self._distance(kernel, new, reverse=True))
        return sum(losses[1:], losses[0])

    def _distance(
        self, table: Any, layer: DistilledEmbedding, reverse: bool = False
    ) -> Any:
        ids = None
        weights = self._weights_of(layer)
        if self.num_rows is not None:
            ids = keras.random.randint(
                (self.num_rows,), 0, layer.input_dim, seed=self.seed_generator
            )
            table = ops.take(table, ids, axis=0)
        rows = layer.reconstruct(ids, reverse=reverse)
        difference = ops.subtract(
            ops.stop_gradient(ops.cast(table, "float32")),
            ops.cast(rows, "float32"),
        )
        distances = ops.sum(ops.square(difference), axis=-1)
        if weights is not None:
            weights = ops.convert_to_tensor(weights)
            if ids is not None:
                weights = ops.take(weights, ids)
            distances = weights * distances
        return mean(distances)

    def _weights_of(self, layer: DistilledEmbedding) -> np.ndarray | None:
        return self._row_weights.get(layer.name, self._row_weights.get(None))

    def get_config(self) -> dict[str, Any]:
        weights = self.row_weights
        if isinstance(weights, dict):
            weights = {k: np.asarray(v).tolist() for k, v in weights.items()}
        elif weights is not None:
            weights = np.asarray(weights).tolist()
        return {
            "num_rows": self.num_rows,
            "seed": self.seed,
            "row_weights": weights,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EmbeddingDistillation:
        return cls(**config)


def _mean_one(weights: Any) -> np.ndarray:
    """Row weights as float32 of mean 1: the weighted sum becomes a mean."""
    array = np.asarray(weights, dtype="float64")
    if (
        array.ndim != 1
        or not np.all(np.isfinite(array))
        or np.any(array < 0)
        or not array.sum() > 0
    ):
        raise ValueError(
            "`row_weights` must be finite numbers of at least zero, one for "
            "each row of the table, not all zero. Received: "
            f"shape={array.shape}, from {array.min(initial=np.inf)} to "
            f"{array.max(initial=-np.inf)}"
        )
    return (array / array.mean()).astype("float32")


def paired_embeddings(
    teacher: keras.Model, student: keras.Model
) -> Iterator[tuple[keras.layers.Layer, DistilledEmbedding]]:
    """Yields each factorised table of the student after the teacher's own.

    Args:
        teacher: A model with embedding layers.
        student: A model in which some of them are `DistilledEmbedding`s of
            the same name, as `compress` leaves them.

    Raises:
        ValueError: As `EmbeddingDistillation.validate_model_compatibility`.
    """
    tables = dict(_named_embeddings(teacher))
    found = False
    for key, layer in _named_embeddings(student):
        if not isinstance(layer, DistilledEmbedding):
            continue
        found = True
        if key not in tables:
            raise ValueError(
                f"`teacher` has no embedding named '{layer.name}' for the "
                f"student's layer of that name. Received: teacher with "
                f"embeddings {[t.name for t in tables.values() if _has_ids(t)]}"
            )
        table = tables[key]
        if getattr(table, "quantization_mode", None) is not None and not (
            isinstance(table, DistilledEmbedding)
        ):
            raise ValueError(
                "`teacher` must hold float tables: those of a quantized layer "
                "mean nothing without their scales. Received: layer "
                f"'{table.name}' with quantization_mode="
                f"{table.quantization_mode!r}"
            )
        shape = tuple(_table_shape(table))
        if shape != (layer.input_dim, layer.output_dim):
            raise ValueError(
                f"`teacher` and `student` must have tables of one shape for "
                f"the layer '{layer.name}'. Received: {shape} in the teacher, "
                f"{(layer.input_dim, layer.output_dim)} in the student"
            )
        yield table, layer
    if not found:
        raise ValueError(
            "`student` has no `DistilledEmbedding` layer to distil a table "
            "into: make it with `compress(teacher)`. Received: student "
            f"'{student.name}'"
        )


def _named_embeddings(
    model: keras.Model,
) -> Iterator[tuple[tuple[str, int], keras.layers.Layer]]:
    """Yields layers with tables after their name and its count so far.

    Dense layers are among them: `compress` replaces those over a vocabulary.
    """
    counts: collections.Counter[str] = collections.Counter()
    for layer in keras_internals.iterate_layers(model):
        if _has_ids(layer) or isinstance(layer, keras.layers.Dense):
            yield (layer.name, counts[layer.name]), layer
            counts[layer.name] += 1


def _has_ids(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.Embedding | DistilledEmbedding)


def _table(layer: keras.layers.Layer) -> Any:
    return layer.embeddings if _has_ids(layer) else ops.transpose(layer.kernel)


def _table_shape(layer: keras.layers.Layer) -> tuple[int | None, int | None]:
    if _has_ids(layer):
        return layer.input_dim, layer.output_dim
    return tuple(reversed(layer.kernel.shape)) if layer.built else (None, None)


def _reverse_kernel(layer: keras.layers.Layer) -> Any:
    """The projection's kernel `(d, V)` of a tied or untied layer."""
    if getattr(layer, "tie_weights", True):
        return ops.transpose(layer.embeddings)
    return layer.reverse_embeddings
