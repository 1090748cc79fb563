"""Cross-entropy over a large vocabulary, whose logits never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.layers import VocabularyProjection


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class ChunkedCrossEntropy(keras.losses.Loss):
    """Softmax cross-entropy of hidden states, without all of their logits.

    The logits of a batch over a large vocabulary, `(batch, time, V)`, are
    often most of what training takes, and in the loss they are needed several
    times over. Here they are computed for `chunk_size` tokens at a time, and
    once more on the way back: in rank space that is cheap. With the features
    `F (V, k)` of a `DistilledEmbedding` and the states `z (k,)` of a token in
    rank space, its loss is

    ```
    log sum_v exp(F_v z) - F_y z
    ```

    Loss and gradients are those of
    `keras.losses.SparseCategoricalCrossentropy(from_logits=True)` of the
    projected states, up to rounding. Compile it with a model that ends with
    hidden states: `without_projection` makes one.

    Args:
        projection: The layer that would project the states: a built
            `DistilledEmbedding`, or a `VocabularyProjection` without an
            activation other than softmax. The model that is compiled must own
            it, or it is not trained.
        chunk_size: Positive integer, the tokens whose logits exist at once.
        label_smoothing: Number in [0, 1): so much of a label's probability is
            spread evenly over the vocabulary.
        ignore_class: Integer or `None`: tokens with this label count nothing.
        reduction: As in other Keras losses.
        name: Name of the loss.
        dtype: As in other Keras losses.

    Call arguments:
        y_true: Integer labels `(...)`, or `(..., 1)`.
        y_pred: Hidden states `(..., output_dim)`.

    Raises:
        TypeError: If `projection` is another layer.
        ValueError: If an argument is out of its range.

    Example:

    ```python
    ids = keras.Input((None,), dtype="int32")
    embedding = DistilledEmbedding(1_000, 64, rank=8, name="tokens")
    hidden = keras.layers.Dense(64)(embedding(ids))
    model = keras.Model(ids, embedding(hidden, reverse=True))

    trunk = without_projection(model)  # the same layers
    trunk.compile("adam", ChunkedCrossEntropy(embedding))
    ids = np.random.randint(1_000, size=(4, 12))
    trunk.fit(ids[:, :-1], ids[:, 1:], verbose=0)
    model.predict(ids, verbose=0)  # is trained
    ```
    """

    def __init__(
        self,
        projection: DistilledEmbedding | VocabularyProjection,
        chunk_size: int = 64,
        label_smoothing: float = 0.0,
        ignore_class: int | None = None,
        reduction: str = "sum_over_batch_size",
        name: str = "chunked_cross_entropy",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        # By name it is in a saved file: `bind` finds the layer again.
        if not isinstance(projection, str):
            _check_projection(projection)
        self.projection = projection
        self.chunk_size = as_integer("chunk_size", chunk_size)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(
                "`label_smoothing` must be a number from 0 to less than 1. "
                f"Received: label_smoothing={label_smoothing!r}"
            )
        self.label_smoothing = float(label_smoothing)
        self.ignore_class = ignore_class

    def bind(self, model: keras.Model) -> None:
        """Finds the layer in `model`, after this loss was loaded with it.

        `load_model` does it; Keras's own loader does not.
        """
        if not isinstance(self.projection, str):
            return
        found = [
            layer
            for layer in keras_internals.iterate_layers(model)
            if layer.name == self.projection
            and isinstance(layer, DistilledEmbedding | VocabularyProjection)
        ]
        if len(found) != 1:
            raise ValueError(
                f"`model` must have one layer '{self.projection}' that "
                f"projects to a vocabulary. Received: model '{model.name}' "
                f"with {len(found)}"
            )
        self.projection = found[0]

    def call(self, y_true: Any, y_pred: Any) -> Any:
        if isinstance(self.projection, str):
            raise ValueError(
                "This loss was loaded without its layer: call `bind(model)` "
                f"first. Received: projection='{self.projection}'"
            )
        embedding, bias = self.projection, None
        if isinstance(embedding, VocabularyProjection):
            embedding, bias = embedding.embedding, embedding.bias
        if len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == 1:
            y_true = ops.squeeze(y_true, -1)
        # Keras has made them floats; exact up to 2^24.
        labels = ops.cast(y_true, "int32")
        counts = None
        if self.ignore_class is not None:
            counts = ops.not_equal(labels, self.ignore_class)
            labels = ops.where(counts, labels, 0)
        states, features, shift = embedding.rank_space(y_pred)
        if shift is not None and embedding.logit_soft_cap is not None:
            # As one more column. Without a cap a softmax does not see it.
            states = ops.concatenate([states, shift[..., None]], axis=-1)
            features = ops.concatenate(
                [features, ops.ones_like(features[:, :1])], axis=-1
            )
        losses = _chunked_cross_entropy(
            ops.reshape(labels, (-1,)),
            ops.reshape(states, (-1, states.shape[-1])),
            features,
            None if bias is None else ops.convert_to_tensor(bias),
            chunk_size=self.chunk_size,
            soft_cap=embedding.logit_soft_cap,
            label_smoothing=self.label_smoothing,
        )
        losses = ops.reshape(losses, ops.shape(labels))
        if shift is not None and embedding.logit_soft_cap is None:
            # Its gradient is zero: without any, optimizers warn.
            losses = losses + 0.0 * ops.cast(shift, losses.dtype)
        if counts is not None:
            keras_internals.set_mask(losses, counts)
        return losses

    def get_config(self) -> dict[str, Any]:
        projection = self.projection
        return {
            **super().get_config(),
            "projection": getattr(projection, "name", projection),
            "chunk_size": self.chunk_size,
            "label_smoothing": self.label_smoothing,
            "ignore_class": self.ignore_class,
        }


def without_projection(model: keras.Model) -> keras.Model:
    """A model up to its vocabulary projection, for `ChunkedCrossEntropy`.

    Args:
        model: A Functional or Sequential model (KerasHub's tasks are) whose
            one output is projected by a `DistilledEmbedding` or a
            `VocabularyProjection`.

    Returns:
        A model of the same layers, hence the same weights, that ends with
        the hidden states. It owns the projection, which it does not call.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it is not symbolic, or ends with something else.

    Example:

    ```python
    ids = keras.Input((None,), dtype="int32")
    embedding = DistilledEmbedding(1_000, 64, rank=8, name="tokens")
    model = keras.Model(ids, embedding(embedding(ids), reverse=True))
    without_projection(model).output.shape  # (None, None, 64)
    ```
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r}"
        )
    hidden, projection = keras_internals.before_last_layer(model)
    if not isinstance(
        projection, DistilledEmbedding | VocabularyProjection
    ) or not keras.backend.is_float_dtype(hidden.dtype):  # a look-up
        raise ValueError(
            "`model` must end with a `DistilledEmbedding` called with "
            "`reverse=True`, or with a `VocabularyProjection`; `compress` "
            f"makes them. Received: model '{model.name}', which ends with "
            f"{projection!r}"
        )
    inputs = keras_internals.input_structure(model)
    trunk = keras.Model(inputs, hidden, name=f"{model.name}_trunk")
    # Tracked, even where the look-up does not use it too.
    trunk.projection = projection
    return trunk


def _chunked_cross_entropy(
    labels: Any,
    states: Any,
    features: Any,
    bias: Any,
    *,
    chunk_size: int,
    soft_cap: float | None,
    label_smoothing: float,
) -> Any:
    """The float32 losses of `n` labels, `logits = states features^T + bias`.

    The states are `(n, k)`, the features `(V, k)`, the bias `(V,)`.
    """
    size = ops.shape(labels)[0]
    chunks = (size + chunk_size - 1) // chunk_size
    share = 1.0 - label_smoothing  # of the label

    def padded(values: Any) -> Any:
        shape = (chunks * chunk_size - size, *values.shape[1:])
        return ops.concatenate([values, ops.zeros(shape, values.dtype)])

    def chunk_of(values: Any, index: Any) -> Any:
        start = (index * chunk_size, *[0] * (len(values.shape) - 1))
        return ops.slice(values, start, (chunk_size, *values.shape[1:]))

    def finished(products: Any, bias: Any) -> tuple[Any, Any]:
        """Logits in float32, and the cap's derivative."""
        logits, slope = ops.cast(products, "float32"), None
        if soft_cap is not None:
            ratio = ops.tanh(logits / soft_cap)
            logits, slope = ratio * soft_cap, 1.0 - ratio**2
        if bias is not None:
            logits = logits + ops.cast(bias, "float32")
        return logits, slope

    def logits_of(chunk: Any, features: Any, bias: Any) -> tuple[Any, Any]:
        products = ops.matmul(chunk, ops.transpose(features))
        return finished(products, bias)

    def losses_of(states: Any, features: Any, *given: Any) -> tuple:
        bias = given[0] if given else None
        rows = ops.take(features, labels, axis=0)
        chosen, slope_of_chosen = finished(
            ops.einsum("nk,nk->n", states, rows),
            None if bias is None else ops.take(bias, labels),
        )
        in_chunks = padded(states)

        def forward(index: Any, losses: Any) -> tuple:
            logits, _ = logits_of(chunk_of(in_chunks, index), features, bias)
            found = ops.logsumexp(logits, axis=-1)
            if label_smoothing:
                found = found - label_smoothing * ops.mean(logits, axis=-1)
            return (ops.slice_update(losses, (index * chunk_size,), found),)

        losses = ops.zeros((chunks * chunk_size,), "float32")
        (losses,) = _for_each(chunks, forward, (losses,))

        def gradients(*args: Any, upstream: Any = None) -> tuple:
            (upstream,) = args if upstream is None else (upstream,)

            def backward(index: Any, of_states: Any, *of_table: Any) -> tuple:
                chunk = chunk_of(in_chunks, index)
                logits, slope = logits_of(chunk, features, bias)
                error = ops.softmax(logits, axis=-1)
                if label_smoothing:
                    error = error - label_smoothing / error.shape[-1]
                error = error * chunk_of(weights, index)[:, None]
                changes = [ops.sum(error, axis=0)] if of_table[1:] else []
                if slope is not None:
                    error = error * slope
                error = ops.cast(error, chunk.dtype)
                changes.insert(0, ops.matmul(ops.transpose(error), chunk))
                of_states = ops.slice_update(
                    of_states,
                    (index * chunk_size, 0),
                    ops.matmul(error, features),
                )
                # Summed in float32: there can be thousands of chunks.
                sums = [
                    total + ops.cast(change, "float32")
                    for total, change in zip(of_table, changes)
                ]
                return (of_states, *sums)

            weights = padded(upstream)
            # The sums over the chunks start from what the labels' own logits
            # contribute: another array of the table's size would be dear.
            error = -share * upstream
            of_table = []
            if bias is not None:
                of_table.append(ops.segment_sum(error, labels, bias.shape[0]))
            if slope_of_chosen is not None:
                error = error * slope_of_chosen
            error = error[:, None]
            of_table.insert(
                0,
                ops.segment_sum(
                    error * ops.cast(states, "float32"),
                    labels,
                    features.shape[0],
                ),
            )
            of_states, *of_table = _for_each(
                chunks, backward, (ops.zeros_like(in_chunks), *of_table)
            )
            of_states = of_states[:size] + ops.cast(error, states.dtype) * rows
            tables = [features] if bias is None else [features, bias]
            return (
                of_states,
                *[
                    ops.cast(gradient, table.dtype)
                    for gradient, table in zip(of_table, tables)
                ],
            )

        return losses[:size] - share * chosen, gradients

    operands = [states, features] if bias is None else [states, features, bias]
    return ops.custom_gradient(losses_of)(*operands)


def _for_each(count: Any, body: Callable, carry: tuple) -> tuple:
    """`carry = body(index, *carry)` for each index below `count`."""
    loop, options = ops.while_loop, {}
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Which otherwise runs up to ten iterations at once, in ten times the
        # memory; Keras's own does not pass this on.
        loop, options = tf.while_loop, {"parallel_iterations": 1}
    return loop(
        lambda index, *_: ops.less(index, count),
        lambda index, *carry: (index + 1, *body(index, *carry)),
        (ops.convert_to_tensor(0, "int32"), *carry),
        **options,
    )[1:]


def _check_projection(projection: Any) -> None:
    if not isinstance(projection, DistilledEmbedding | VocabularyProjection):
        raise TypeError(
            "`projection` must be a `DistilledEmbedding` or a "
            f"`VocabularyProjection`. Received: projection={projection!r}"
        )
    if not projection.built:
        raise ValueError(
            "`projection` must be built: call it, or its `build()`, first. "
            f"Received: layer '{projection.name}'"
        )
    known = keras.activations.linear, keras.activations.softmax
    if (
        isinstance(projection, VocabularyProjection)
        and projection.activation not in known
    ):
        raise ValueError(
            "`projection` must end with logits or with a softmax. Received: "
            f"layer '{projection.name}' with activation="
            f"{projection.activation}"
        )
