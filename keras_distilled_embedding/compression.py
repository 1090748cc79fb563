"""`compress(model)`: every embedding table replaced by its factors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding import _surgery
from keras_distilled_embedding._arguments import as_integer
from keras_distilled_embedding._targets import Target
from keras_distilled_embedding._targets import choose_targets
from keras_distilled_embedding._targets import embedding_of
from keras_distilled_embedding._targets import heads_of
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import as_metric
from keras_distilled_embedding.factorization import check_finite_rows
from keras_distilled_embedding.factorization import factorize
from keras_distilled_embedding.factorization import is_lifted
from keras_distilled_embedding.factorization import largest_useful_rank
from keras_distilled_embedding.factorization import rank_for_error
from keras_distilled_embedding.factorization import spread_ranks
from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)
from keras_distilled_embedding.layers.vocabulary_projection import (
    VocabularyProjection,
)
from keras_distilled_embedding.report import compression_report
from keras_distilled_embedding.report import dtype_bytes
from keras_distilled_embedding.saving import refuse_to_forget

Layer = keras.layers.Layer


def compress(
    model: keras.Model,
    compression: float | None = 8.0,
    *,
    rank: int | None = None,
    activation: str | Callable | None = "relu",
    hidden_dim: int | None = None,
    method: str = "exact",
    token_frequencies: Any = None,
    layers: Iterable[str] | Callable[[Layer], bool] | None = None,
    verbose: int = 1,
    min_parameters: int = 0,
    heads: str | None = None,
    max_bytes: int | None = None,
    max_error: float | None = None,
    hidden_covariances: Any = None,
    hidden_activation: str | Callable | None = "gelu",
) -> keras.Model:
    """Returns a copy of a model with its embedding tables factorised.

    Each `keras.layers.Embedding` or `keras.layers.ReversibleEmbedding`,
    KerasHub's included, becomes a `layers.DistilledEmbedding` of the same
    name, wherever the model keeps and calls it: in graphs, in nested models,
    inside other layers, as an attribute of a subclassed model. A table that
    is used several times stays one layer. The copy has the model's class, and
    its names, compile settings (with a new optimizer), dtype policies,
    preprocessors and other weights.

    Save it with `save_model`: the configuration of a class such as KerasHub's
    does not tell what was replaced, so that `model.save()` refuses.

    At 8x most of a table's energy is gone: plan to fine-tune. What brought a
    translation model back best is a `Distiller` with `LogitsDistillation()`,
    `student_loss_weight=0.3` and `student_training=False` (no dropout), Adam
    at a peak learning rate of 2e-3, as high as a training from scratch takes,
    and a cosine to zero, for half as many epochs as its teacher was trained
    (`docs/distillation.md`).

    Args:
        model: A built model. It is left as it is, and the result shares no
            variable with it. Functional and Sequential models are copied as
            the graphs they are, others by `from_config(get_config())`.
        compression: Float above 1, how many times fewer parameters each table
            has at least. The largest rank that gives it is taken.
        rank: Integer, the rank of every table, instead of `compression`.
            This, `max_bytes` and `max_error` exclude each other.
        activation: `f` in `E ~ f(U) W`. `None` is plain low rank.
        hidden_dim: Integer or `None`, width of the non-linear funnel, see
            `layers.DistilledEmbedding`.
        method: `"exact"` or `"learned"`, see `factorize`.
        token_frequencies: Array `(input_dim,)`, how often each token occurs
            where the model reads and predicts it, special tokens included,
            from `count_tokens`: the error of frequent rows then counts for
            more. A dictionary by layer name where tables differ.
        layers: Names of the layers to replace, or a function of a layer that
            tells. By default all, but for tables so small that no rank gives
            `compression`.
        verbose: 1 prints the `compression_report` and progress, 0 nothing.
        min_parameters: Integer, tables of fewer parameters are left as they
            are.
        heads: What becomes of dense layers that project to the vocabulary
            with a kernel of their own, a second table. `"factorize"` replaces
            each by a `layers.VocabularyProjection` with factors of its own;
            `"tie"` by one that shares the factors of the embedding, so that
            the kernel's own values are lost, and distillation has to teach
            them anew. By default they are left as they are.
        max_bytes: Integer, what the factors of all tables may take together,
            instead of `compression`. The budget is spread over them by their
            spectra: each unit of rank goes where it saves most of a table's
            energy for its bytes.
        max_error: Float in (0, 1), the share of its energy that each table
            may lose, instead of `compression`. The smallest rank is taken.
        hidden_covariances: Array `(output_dim, output_dim)`, the second
            moment of the hidden states that multiply the table, from
            `hidden_covariance`: the logits' error then counts, not the
            entries'. A dictionary by layer name where tables differ.
        hidden_activation: `g` of the funnel, see `layers.DistilledEmbedding`.

    Returns:
        A new, built model of the same class.

    Raises:
        TypeError: If `model` is not a Keras model, or if it feeds an
            embedding with ids that are not integers, as those of a
            `keras.Input` without `dtype="int32"` are.
        ValueError: If `model` is not built, or cannot be copied from its
            configuration, if it has no (chosen) embedding, if a size would
            not make a table smaller or is out of reach, if a table is not
            finite, or if `token_frequencies`, `hidden_covariances` or `heads`
            do not fit.

    Example:

    ```python
    teacher = keras.Sequential([
        keras.Input((None,), dtype="int32"),
        keras.layers.Embedding(10_000, 128, name="tokens"),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(2),
    ])
    student = compress(teacher, compression=8.0)
    compression_report(student).to_dict()["rows"][0]["rank"]  # 15
    ```

    References:
    - [Lioutas et al., 2019](https://arxiv.org/abs/1910.06720)
    """
    _surgery.check_copyable(model)
    sizes = {"rank": rank, "max_bytes": max_bytes, "max_error": max_error}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if len(sizes) > 1:
        raise ValueError(
            "Give at most one of `rank`, `max_bytes` and `max_error`. "
            f"Received: {sizes}"
        )
    options = {
        "activation": activation,
        "hidden_dim": hidden_dim,
        "hidden_activation": hidden_activation,
    }
    if heads not in (None, "tie", "factorize"):
        raise ValueError(
            '`heads` must be None, "tie" or "factorize". '
            f"Received: heads={heads!r}"
        )
    targets = choose_targets(
        model,
        layers,
        heads,
        as_integer("min_parameters", min_parameters, minimum=0),
    )
    weights = _Weights(token_frequencies, hidden_covariances)
    if max_bytes is not None or max_error is not None:
        ranks = _plan_ranks(
            targets, weights, max_bytes, max_error, activation, hidden_dim
        )
        sizes = {target: {"rank": rank} for target, rank in ranks.items()}
    else:
        size = sizes or {"compression": compression}
        sizes = dict.fromkeys(targets, size)
    chosen = _build_factors(sizes, options, optional=layers is None)
    weights.check(chosen)
    tied = heads_of(model, chosen) if heads == "tie" else []
    replacements = _replacements(chosen, tied)

    # Graphs first, factors later: what can fail fails before it costs time.
    (student,) = _surgery.copy_models([model], replacements)
    for target in chosen:  # the last table, too, before the first is factorised
        _check_finite(target)
    for target, new in chosen.items():
        if verbose:
            print(f"Factorising '{target.name}'")
        factors = [
            factorize(
                table,
                new.rank,
                method=method,
                verbose=verbose,
                **weights.of(target),
                **options,
            )
            for table in target.tables()
        ]
        new.set_factors(*factors)
    refuse_to_forget(student)
    _compile_alike(student, model)
    if verbose:
        print(compression_report(student, model))
        _print_what_is_left(student, chosen)
    return student


def _build_factors(
    sizes: dict[Target, dict[str, Any]],
    options: dict[str, Any],
    optional: bool,
) -> dict[Target, DistilledEmbedding]:
    """The factors of each table, still random.

    A table of a few rows, segments say, may be left as it is; one that was
    asked for (not `optional`) may not.
    """
    chosen, refused = {}, None
    for target, size in sizes.items():
        try:
            chosen[target] = target.factorized(**size, **options)
        except ValueError as error:
            refused = ValueError(f"Layer '{target.name}': {error}")
            if not optional:
                raise refused from error
    if not chosen:
        raise refused
    return chosen


def _replacements(
    chosen: Mapping[Target, DistilledEmbedding], tied: Iterable[Layer]
) -> dict[Layer, Layer]:
    """What stands in for which layer of the model."""
    embeddings = {t: new for t, new in chosen.items() if not t.is_head}
    replacements: dict[Layer, Layer] = {
        target.layer: new for target, new in embeddings.items()
    }
    heads = {t.layer: new for t, new in chosen.items() if t.is_head}
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
        _surgery.compile_alike(student, model)
    except Exception as error:
        warnings.warn(
            "The compressed model is not compiled as the model was: "
            f"{error}. Compile it.",
            stacklevel=3,
        )


def _print_what_is_left(student: keras.Model, chosen: Iterable[Target]) -> None:
    left = [
        layer.name
        for layer in _surgery.iterate_layers(student)
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


def _plan_ranks(
    targets: list[Target],
    weights: _Weights,
    max_bytes: int | None,
    max_error: float | None,
    activation: str | Callable | None,
    hidden_dim: int | None,
) -> dict[Target, int]:
    """Ranks from the spectra of the tables; small tables have none."""
    hidden_dim = as_integer("hidden_dim", hidden_dim, or_none=True)
    large_enough = [
        target
        for target in targets
        if largest_useful_rank(target.input_dim, target.output_dim, hidden_dim)
    ]
    weights.check(large_enough)
    for target in large_enough:
        _check_finite(target)
    groups = {
        target: [
            Table.of(table, **weights.of(target)) for table in target.tables()
        ]
        for target in large_enough
    }
    if not groups:
        raise ValueError(
            "No rank makes a table smaller. Received: tables of shapes "
            f"{[(t.input_dim, t.output_dim) for t in targets]}"
        )
    lifted = is_lifted(activation)
    if max_error is not None:
        return {
            target: max(rank_for_error(t, max_error, lifted) for t in tables)
            for target, tables in groups.items()
        }
    max_bytes = as_integer("max_bytes", max_bytes)
    # Of mixed dtypes the widest, so that the budget holds.
    itemsize = max(dtype_bytes(target.variable_dtype) for target in groups)
    try:
        ranks = spread_ranks(
            list(groups.values()), max_bytes / itemsize, lifted, hidden_dim
        )
    except ValueError as error:
        raise ValueError(
            f"`max_bytes` is too small, at {itemsize} bytes a parameter: "
            f"{error}. Received: max_bytes={max_bytes}"
        ) from error
    return dict(zip(groups, ranks))


class _Weights:
    """The weights of rows and columns.

    Args:
        token_frequencies: As of `compress`.
        hidden_covariances: As of `compress`.
    """

    def __init__(self, token_frequencies: Any, hidden_covariances: Any) -> None:
        self._given = {
            "token_frequencies": token_frequencies,
            "hidden_covariances": hidden_covariances,
        }
        self._rows: dict[Target, Any] = {}
        self._columns: dict[Target, Any] = {}

    def check(self, targets: Iterable[Target]) -> None:
        """Refuses what does not fit the layers to compress."""
        self._rows, self._columns = (
            _by_layer(targets, values, name)
            for name, values in self._given.items()
        )
        for target, frequencies in self._rows.items():
            self._rows[target] = _checked_frequencies(target, frequencies)
        for target, covariance in self._columns.items():
            _check_covariance(target, covariance)

    def of(self, target: Target) -> dict[str, Any]:
        """Arguments of `factorize` and of `Table.of`."""
        return {
            "row_weights": self._rows.get(target),
            "column_weights": self._columns.get(target),
        }


def _by_layer(
    targets: Iterable[Target], values: Any, name: str
) -> dict[Target, Any]:
    """One value for all targets, or a dictionary by their names."""
    if values is None:
        return {}
    names = [target.name for target in targets]
    if not isinstance(values, Mapping):
        values = dict.fromkeys(names, values)
    if not set(values) <= set(names):
        raise ValueError(
            f"`{name}` must be by names of compressed layers, of {names}. "
            f"Received: {list(values)}"
        )
    return {
        target: values[target.name]
        for target in targets
        if target.name in values
    }


def _checked_frequencies(target: Target, frequencies: Any) -> np.ndarray:
    frequencies = np.asarray(frequencies)
    wanted = f"`token_frequencies` of layer '{target.name}' must "
    if frequencies.shape != (target.input_dim,):
        raise ValueError(
            f"{wanted}have shape ({target.input_dim},), one number a token. "
            f"Received: shape {frequencies.shape}"
        )
    if frequencies.dtype.kind not in "iuf":
        raise ValueError(
            f"{wanted}be numbers. Received: dtype {frequencies.dtype}"
        )
    if not (np.isfinite(frequencies) & (frequencies >= 0)).all():
        raise ValueError(
            f"{wanted}be finite and not negative. Received: numbers from "
            f"{frequencies.min()} to {frequencies.max()}"
        )
    if not frequencies.any():
        raise ValueError(f"{wanted}not all be 0. Received: only zeros")
    return frequencies


def _check_covariance(target: Target, covariance: Any) -> None:
    try:
        as_metric(covariance, target.output_dim)
    except ValueError as error:
        raise ValueError(
            f"`hidden_covariances` of layer '{target.name}': {error}"
        ) from error


def _check_finite(target: Target) -> None:
    for table in target.tables():
        try:
            check_finite_rows(table)
        except ValueError as error:
            raise ValueError(f"Layer '{target.name}': {error}") from error
