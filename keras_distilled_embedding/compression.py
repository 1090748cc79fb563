"""`compress(model)`: every embedding table replaced by its factors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any
from typing import TypeAlias

import keras

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding._utils.arguments import check_built_model
from keras_distilled_embedding.budget import AUTO
from keras_distilled_embedding.budget import SizeRequest
from keras_distilled_embedding.budget import plan
from keras_distilled_embedding.calibration import CALIBRATION_TOKENS
from keras_distilled_embedding.calibration import tables_of
from keras_distilled_embedding.factorization import check_method
from keras_distilled_embedding.factorization import factorize_table
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.layers import VocabularyProjection
from keras_distilled_embedding.layers.conversion import assign_factors
from keras_distilled_embedding.report import compression_report
from keras_distilled_embedding.saving import refuse_to_forget
from keras_distilled_embedding.targets import Target
from keras_distilled_embedding.targets import choose_targets
from keras_distilled_embedding.targets import embedding_of
from keras_distilled_embedding.targets import heads_of

Layer: TypeAlias = keras.layers.Layer


def compress(
    model: keras.Model,
    compression: float | None = None,
    *,
    rank: int | None = None,
    max_bytes: int | None = None,
    max_error: float | None = None,
    min_speedup: float | None = None,
    quantization: str | None = AUTO,
    activation: str | Callable | None = "relu",
    use_bias: bool = True,
    method: str = "exact",
    calibration_data: Any = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    layers: Iterable[str] | Callable[[Layer], bool] | None = None,
    min_parameters: int = 0,
    heads: str | None = None,
    verbose: int = 1,
) -> keras.Model:
    """Returns a copy of a model with its embedding tables factorized.

    Each `keras.layers.Embedding` or `keras.layers.ReversibleEmbedding`,
    KerasHub's included, becomes a `layers.DistilledEmbedding` of the same
    name, wherever the model keeps and calls it: in graphs, in nested models,
    inside other layers, as an attribute of a subclassed model. A table that
    is used several times stays one layer. The copy has the model's class, and
    its names, compile settings (with a new optimizer), dtype policies,
    preprocessors and other weights.

    Save it with `save_model`: the configuration of a class such as KerasHub's
    does not tell what was replaced, so that `model.save()` refuses.

    The more is saved, the more a fine-tuning is needed. What brought a
    translation model back best is a `Distiller` with `LogitsDistillation()`,
    `student_loss_weight=0.3` and `student_training=False` (no dropout), Adam
    at a peak learning rate of 2e-3, as high as a training from scratch takes,
    and a cosine to zero, for half as many epochs as its teacher was trained
    (`docs/distillation.md`).

    Args:
        model: A built model. It is left as it is, and the result shares no
            variable with it. Functional and Sequential models are copied as
            the graphs they are, others by `from_config(get_config())`.
        compression: Float above 1, how many times fewer bytes each table
            takes at least, as it is stored, scales and all, than in float32.
            The largest rank that gives it is taken. Give at most one of this,
            `rank`, `max_bytes` and `max_error`; without any of them,
            `compression` is 8.
        rank: Integer, the rank of every table.
        max_bytes: Integer, what the factors of all tables may take together,
            as the file of `export_litert` stores them. The budget is spread
            over the tables by their spectra: each unit of rank (for int4,
            each 32 of them, which take the bytes of one) goes where it saves
            most of a table's energy for its bytes.
        max_error: Float in (0, 1), the share of its energy that each table
            may lose, rounding included; with `calibration_data`, that of its
            logits. The smallest rank is taken.
        min_speedup: Float of at least 1, how many times fewer multiplications
            a projection through the factors takes at least than one with the
            table, `r (V + d)` instead of `V d`. It limits the ranks, however
            they are chosen: with `max_error`, more may be lost then. A file
            in int4 multiplies with `r` filled up to a multiple of 32, and so
            is counted; 2 bits with a scale a column, which LiteRT multiplies
            about ten times slower than others, are then taken only where
            nothing else will do. `None`: `compression` and `max_bytes` spend
            nothing on ranks that take over 5 % more multiplications than the
            table.
        quantization: How the factors of all tables are stored: `"int8"`,
            `"int4"`, `"int2"`, or `None` for floats. The new layers compute
            with their codes rounded so, and are trained as they will be
            stored. `"auto"` plans rank and bits together: of all these it
            takes what is expected to lose the least of the logits' energy at
            the given size, or of the tables' without `calibration_data` (with
            `max_error`, the fewest bytes; with `rank`, floats). Whether each
            row has a scale of its own is planned, too.
        activation: `f` in `E ~ f(U) W + 1 c`.
        use_bias: Boolean, whether there is an offset `c`.
        method: `"exact"` or `"learned"`, see `factorize`.
        calibration_data: What the model reads, see `calibrate`: a
            `tf.data.Dataset`, a `PyDataset`, a list of batches, or of texts
            where the model has a preprocessor. Token counts and the second
            moment of the hidden states that tables project are collected
            from it, and weigh rows, columns and rounding. A model that is
            used as it is depends on it; after a long training it shows at
            the smallest sizes alone (`docs/results.md`).
        calibration_tokens: Integer, after how many tokens to stop reading.
        layers: Names of the layers to replace, or a function of a layer that
            tells. By default all, except tables so small that no rank gives
            the size.
        min_parameters: Integer, tables of fewer parameters are left as they
            are.
        heads: What becomes of dense layers that project to the vocabulary
            with a kernel of their own, a second table. `"factorize"` replaces
            each by a `layers.VocabularyProjection` with factors of its own;
            `"tie"` by one that shares the factors of the embedding, so that
            the kernel's own values are lost, and distillation has to teach
            them anew. By default they are left as they are.
        verbose: 1 prints the `compression_report` and progress, 0 nothing.

    Returns:
        A new, built model of the same class.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If `model` is not built, or cannot be copied from its
            configuration, if it has no (chosen) embedding, if a size would
            not make a table smaller or is out of reach, if a table is not
            finite, if arguments exclude each other, or if
            `calibration_data` or `heads` do not fit.

    Example:

    ```python
    teacher = keras.Sequential([
        keras.Input((None,), dtype="int32"),
        keras.layers.Embedding(10_000, 128, name="tokens"),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(2),
    ])
    student = compress(teacher, compression=8.0)
    compression_report(student).rows[0].ratio  # 8.8
    ```

    References:
    - [Lioutas et al., 2019](https://arxiv.org/abs/1910.06720)
    """
    check_built_model("model", model)
    request = SizeRequest(
        compression,
        rank=rank,
        max_bytes=max_bytes,
        max_error=max_error,
        min_speedup=min_speedup,
        quantization=quantization,
        activation=activation,
        use_bias=use_bias,
    )
    check_method(method, activation)
    if heads not in (None, "tie", "factorize"):
        raise ValueError(
            '`heads` must be None, "tie" or "factorize". '
            f"Received: heads={heads!r}"
        )
    min_parameters = as_integer("min_parameters", min_parameters, minimum=0)
    calibration_tokens = as_integer("calibration_tokens", calibration_tokens)
    targets = choose_targets(model, layers, heads, min_parameters)
    tables = tables_of(
        model, targets, calibration_data, calibration_tokens, verbose
    )
    ranks, kind, reason = plan(tables, request, optional=layers is None)
    if verbose and reason:
        print(reason)
    form: dict[str, Any] = {"activation": activation, "use_bias": use_bias}
    if kind is not None:
        form["quantization"] = kind.name
        form["row_scales"] = kind.has_row_scales
    chosen = {
        target: target.new_layer(rank, **form) for target, rank in ranks.items()
    }
    tied = heads_of(model, chosen) if heads == "tie" else []
    replacements = _replacements(chosen, tied)

    # Graphs first, factors later: what can fail fails before it costs time.
    (student,) = keras_internals.copy_models([model], replacements)
    for target, new in chosen.items():
        if verbose:
            print(f"Factorizing '{target.name}'")
        factors = [
            factorize_table(table, new.rank, method=method, **form)
            for table in tables[target]
        ]
        assign_factors(new, *factors)
    refuse_to_forget(student)
    _compile_alike(student, model)
    if verbose:
        print(compression_report(student, model))
        _print_what_is_left(student, chosen)
    return student


def _replacements(
    chosen: Mapping[Target, DistilledEmbedding], tied: Iterable[Layer]
) -> dict[Layer, Layer]:
    """What stands in for which layer of the model."""
    embeddings = {t: new for t, new in chosen.items() if not t.is_dense}
    replacements: dict[Layer, Layer] = {
        target.layer: new for target, new in embeddings.items()
    }
    heads = {t.layer: new for t, new in chosen.items() if t.is_dense}
    for head in tied:
        heads[head] = embeddings[embedding_of(head, embeddings)]
    for head, factors in heads.items():
        replacements[head] = VocabularyProjection(
            factors,
            activation=head.activation,
            use_bias=head.use_bias,
            name=head.name,
            dtype=head.dtype_policy,
            trainable=head.trainable,
        )
        replacements[head].build()
        if head.use_bias:
            # A copy: on JAX what is assigned is kept.
            replacements[head].bias.assign(keras.ops.copy(head.bias))
    return replacements


def _compile_alike(student: keras.Model, model: keras.Model) -> None:
    try:
        keras_internals.compile_alike(student, model)
    except Exception as error:
        warnings.warn(
            "The compressed model is not compiled as the model was: "
            f"{error}. Compile it.",
            stacklevel=3,
        )


def _print_what_is_left(student: keras.Model, chosen: Iterable[Target]) -> None:
    left = [
        layer.name
        for layer in keras_internals.iterate_layers(student)
        if isinstance(layer, keras.layers.Embedding)
    ]
    if left:
        print(f"Left as they are: {', '.join(left)}")
    heads = [layer.name for layer in heads_of(student, chosen)]
    if heads:
        print(
            f"Projects to the vocabulary with a table of its own: "
            f'{", ".join(heads)}. `heads="factorize"` or `heads="tie"` '
            "replaces it, too."
        )
