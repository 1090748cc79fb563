"""The distance of the student's tables from its teacher's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.distillation import DistillationLoss

from keras_distilled_embedding._utils.arguments import as_optional_integer
from keras_distilled_embedding._utils.masked_mean import mean
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.targets import named_tables


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class EmbeddingDistillation(DistillationLoss):
    """Squared distance between the teacher's tables and the student's.

    For every `layers.DistilledEmbedding` of the student and the table of the
    same name in the teacher (of several layers of one name, the first, second,
    ... are paired), the mean over the rows of the table is

    ```
    1/V sum_i ||E_i - E~_i||^2        E (V, d): the teacher's, fixed
    ```

    The loss is the sum of these over the layers. An untied layer counts both
    of its tables. With row weights `w` the mean is
    `sum_i w_i ||.||^2 / sum_i w_i`. The teacher does not run for this loss.

    Args:
        num_rows: Integer or `None`. If given, so many rows are drawn at random
            at every step, and the mean over them is an unbiased estimate of
            the mean over all rows. `None` uses all rows, which costs about
            `rank / output_dim` of what projecting a batch of `V` tokens costs.
        seed: Integer, seed of the draws.
        row_weights: Array `(V,)` of numbers of at least zero, such as token
            frequencies: how much each row counts. A dictionary gives each
            layer its own weights, by the layer's name. By default, and for
            layers that are not in the dictionary, all rows count equally.

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
        # By layer name; those of `None` are for every other layer.
        if not isinstance(row_weights, dict):
            row_weights = {} if row_weights is None else {None: row_weights}
        self._row_weights = {
            name: _mean_one(weights) for name, weights in row_weights.items()
        }

    def validate_model_compatibility(
        self, teacher: keras.Model, student: keras.Model
    ) -> None:
        """Raises a `ValueError` if tables cannot be paired or weighted."""
        layers = [layer for _, layer in paired_tables(teacher, student)]
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
        for old, new in paired_tables(teacher, student):
            losses.append(self._distance(old, new))
            if not new.tie_weights:
                losses.append(self._distance(old, new, reverse=True))
        return sum(losses[1:], losses[0])

    def _distance(
        self,
        teacher: keras.layers.Layer,
        layer: DistilledEmbedding,
        reverse: bool = False,
    ) -> Any:
        table = _table_of(teacher, reverse)
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
    """Scales row weights to mean 1, so that the mean of `w_i x_i` is right."""
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


def paired_tables(
    teacher: keras.Model, student: keras.Model
) -> Iterator[tuple[keras.layers.Layer, DistilledEmbedding]]:
    """Yields the teacher's layer and the student's, of each such table."""
    tables = dict(named_tables(teacher))
    found = False
    for key, target in named_tables(student):
        if not target.is_factorized:
            continue
        found = True
        if key not in tables:
            names = [t.name for t in tables.values() if not t.is_dense]
            raise ValueError(
                f"`teacher` has no embedding named '{target.name}' for the "
                "student's layer of that name. Received: teacher with "
                f"embeddings {names}"
            )
        table = tables[key]
        mode = getattr(table.layer, "quantization_mode", None)
        if mode is not None and not table.is_factorized:
            raise ValueError(
                "`teacher` must hold float tables, not quantized ones. "
                f"Received: layer '{table.name}' with "
                f"quantization_mode={mode!r}"
            )
        if table.shape != target.shape:
            raise ValueError(
                "`teacher` and `student` must have tables of one shape for "
                f"the layer '{target.name}'. Received: {table.shape} in the "
                f"teacher, {target.shape} in the student"
            )
        yield table.layer, target.layer
    if not found:
        raise ValueError(
            "`student` has no `DistilledEmbedding` layer, into which a table "
            "could be distilled: make it with `compress(teacher)`. Received: "
            f"student '{student.name}'"
        )


def _table_of(layer: keras.layers.Layer, reverse: bool) -> Any:
    """Returns the table `(V, d)` of the look-up or of the projection."""
    if isinstance(layer, keras.layers.Dense):
        return ops.transpose(layer.kernel)
    if reverse and not getattr(layer, "tie_weights", True):
        return ops.transpose(layer.reverse_embeddings)
    return layer.embeddings
