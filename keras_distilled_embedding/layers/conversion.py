"""Making a layer of factors from a layer with a table."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding.factorization import Factorization
from keras_distilled_embedding.factorization import Factors
from keras_distilled_embedding.factorization import factorize
from keras_distilled_embedding.factorization import is_linear
from keras_distilled_embedding.factorization import round_features
from keras_distilled_embedding.factorization.activations import activate
from keras_distilled_embedding.factorization.rounding import evenly_spaced
from keras_distilled_embedding.factorization.table import row_blocks
from keras_distilled_embedding.keras_internals import without_initial_values
from keras_distilled_embedding.quantization import check_quantization
from keras_distilled_embedding.quantization import format_of
from keras_distilled_embedding.sizes import check_rank
from keras_distilled_embedding.sizes import rank_for_compression

if TYPE_CHECKING:
    from keras_distilled_embedding.layers.distilled_embedding import (
        DistilledEmbedding,
    )

# Options of `factorize`, which the layer does not take, and of both.
_FACTORIZE_OPTIONS = (
    "method",
    "row_weights",
    "column_weights",
    "seed",
    "verbose",
)
_COMMON_OPTIONS = ("activation", "use_bias", "quantization", "row_scales")

# Rows of codes whose mean and principal components stand for those of all.
_SAMPLED_CODES = 16_384

# What a new layer takes over from the layer it replaces. Not the constraint:
# one on the rows of a table says nothing about the rows of the codes, and
# would undo the factorization at the first training step. Nor the initializer,
# which is often the table itself, as a constant.
_INHERITED_OPTIONS = (
    "name",
    "trainable",
    "activity_regularizer",
    "tie_weights",
    "embeddings_regularizer",
    "mask_zero",
    "reverse_dtype",
    "logit_soft_cap",
)


def factorized_layer(
    cls: type[DistilledEmbedding],
    embedding: Any,
    rank: int | None,
    compression: float | None,
    **kwargs: Any,
) -> DistilledEmbedding:
    """Implements `DistilledEmbedding.from_embedding`."""
    options = {k: kwargs.pop(k) for k in _FACTORIZE_OPTIONS if k in kwargs}
    if (rank is None) == (compression is None):
        raise ValueError(
            "Give exactly one of `rank` and `compression`. "
            f"Received: rank={rank}, compression={compression}"
        )
    check_quantization("quantization", kwargs.get("quantization"))
    kind = None
    if kwargs.get("quantization") is not None:
        kind = format_of(kwargs["quantization"], kwargs.get("row_scales", True))
    size = kind, kwargs.get("use_bias", True)
    shape = table_shape(embedding)
    if compression is not None:
        rank = rank_for_compression(*shape, compression, *size)
    rank = check_rank(rank, *shape, *size)
    layer = new_layer(cls, embedding, rank, **kwargs)
    options |= {k: kwargs[k] for k in _COMMON_OPTIONS if k in kwargs}
    factors = [
        factorize(table, layer.rank, **options)
        for table in embedding_tables(embedding)
    ]
    if not layer.tie_weights and len(factors) == 1:
        factors *= 2
    assign_factors(layer, *factors)
    return layer


def new_layer(
    cls: type[DistilledEmbedding], embedding: Any, rank: int, **kwargs: Any
) -> DistilledEmbedding:
    """The built layer that would replace `embedding`, its weights zeros.

    Args:
        cls: Class of the layer.
        embedding: As of `DistilledEmbedding.from_embedding`.
        rank: Integer.
        **kwargs: Arguments of the layer, in place of those of `embedding`.
    """
    options = _inherited_options(embedding) | kwargs
    uses_offset = options.get("use_bias", True)
    activation = keras.activations.get(options.get("activation", "relu"))
    # The closed form without an activation is centered by itself.
    options.setdefault("centered", uses_offset and not is_linear(activation))
    layer = cls(*table_shape(embedding), rank, **options)
    # Values that are not kept would be most of the memory.
    with without_initial_values():
        layer.build()
    return layer


def assign_factors(
    layer: DistilledEmbedding,
    factors: Factorization | Factors,
    reverse: Factorization | Factors | None = None,
) -> None:
    """Assigns what `factorize` returned to a built layer.

    The layer's own coordinates suit training: an offset at the codes' center,
    which it would otherwise not keep while the basis moves, and a basis of
    their principal components.

    Args:
        layer: The layer.
        factors: The factors of its table.
        reverse: Those of the projection's table, for an untied layer.
    """
    for prefix, found in (("", factors), ("reverse_", reverse)):
        if found is None:
            continue
        basis, offset, center = found.basis, found.offset, found.center
        sample = found.codes[evenly_spaced(len(found.codes), _SAMPLED_CODES)]
        features = activate(layer.activation, sample)
        if offset is not None and (layer.centered or center is not None):
            if center is None:
                center = features.mean(axis=0)
            # As the layer holds it, in as few bits.
            dtype = getattr(layer, f"{prefix}center").dtype
            center = to_numpy(ops.cast(center, dtype))
            offset = offset + center @ basis
        values = {"codes": found.codes, "offset": offset, "center": center}
        if found.scales is not None:
            rotation = _principal_directions(features)
            values |= {"scales": found.scales, "rotation": rotation}
            basis = rotation.T @ basis
        for name, value in (values | {"basis": basis}).items():
            if value is not None:
                _assign(getattr(layer, prefix + name), value)


def _assign(variable: Any, value: Any) -> None:
    """Assigns an array, a block of rows at a time where a backend can.

    A large table in two pieces of memory would be most of what a model takes.
    """
    if len(value.shape) != 2 or not _is_tensorflow_variable(variable.value):
        variable.assign(np.asarray(value))
        return
    import tensorflow as tf

    for rows, block in row_blocks(value):
        # What `variable[rows].assign` does, but for reading the variable.
        tf.raw_ops.ResourceStridedSliceAssign(
            ref=variable.value.handle,
            begin=[rows.start],
            end=[rows.stop],
            strides=[1],
            value=ops.cast(block, variable.dtype),
        )


def _is_tensorflow_variable(value: Any) -> bool:
    """Whether a variable is one of TensorFlow's, on one device."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return isinstance(value, tf.Variable) and not isinstance(
        value, tf.distribute.DistributedValues
    )


def _principal_directions(features: np.ndarray) -> np.ndarray:
    """Float32 `(rank, rank)`, orthogonal: an axis a column."""
    centered = features - features.mean(axis=0)
    moments = (centered.T @ centered).astype("float64")
    return np.linalg.eigh(moments)[1].astype("float32")


def round_layer(layer: DistilledEmbedding, factors: list[Factors]) -> None:
    """Gives a layer its factors in coordinates that suit its format.

    Args:
        layer: A built layer with a `format`.
        factors: What `factors_of` returned of it.
    """
    kind = layer.format
    assert kind is not None
    if layer.lora_enabled:
        # Its change is to the codes as they are, which keep the layer's grid.
        found = [
            f._replace(
                codes=to_numpy(getattr(layer, f"{prefix}codes")),
                center=to_numpy(getattr(layer, f"{prefix}center")),
            )
            for prefix, f in zip(("", "reverse_"), factors)
        ]
    else:
        found = [round_features(f, layer.activation, kind) for f in factors]
    assign_factors(layer, *found)


def factors_of(layer: DistilledEmbedding) -> list[Factors]:
    """The float factors of a layer's look-up, and of an untied projection.

    Args:
        layer: A built layer.

    Returns:
        Those of `f(U) W + 1 c`.
    """
    prefixes = [""] if layer.tie_weights else ["", "reverse_"]
    return [factors_of_table(layer, prefix) for prefix in prefixes]


def factors_of_table(layer: DistilledEmbedding, prefix: str) -> Factors:
    """One of them, by the prefix of its variables."""

    def read(name: str) -> np.ndarray:
        return to_numpy(layer._read(f"{prefix}{name}", "float32"))

    basis, offset = to_numpy(layer._basis("float32", prefix)), None
    if layer.use_bias:
        offset = read("offset")
        if layer.centered or layer.format is not None:
            offset = offset - read("center") @ basis
    return Factors(read("codes"), basis, offset)


def embedding_tables(embedding: Any) -> list[np.ndarray]:
    """The effective tables of an embedding layer, or of an array.

    Args:
        embedding: A built embedding layer or a table.

    Returns:
        The table of the look-up and, if it is another one, that of the
        projection; both `(input_dim, output_dim)`, LoRA weights merged and
        dequantized.
    """
    if not _is_layer(embedding):
        return [to_numpy(embedding)]
    untied = not getattr(embedding, "tie_weights", True)
    if getattr(embedding, "quantization_mode", None) is None:
        tables = [to_numpy(embedding.embeddings)]
        if untied:
            tables.append(to_numpy(embedding.reverse_embeddings).T)
        return tables
    # Quantized variables mean nothing without their scales, so ask the layer
    # for what it computes. Not through `__call__`, which would record losses.
    ids = ops.arange(embedding.input_dim, dtype="int32")
    tables = [to_numpy(embedding.quantized_call(ids))]
    if untied:
        unit_vectors = ops.eye(
            embedding.output_dim, dtype=embedding.compute_dtype
        )
        logits = to_numpy(embedding.quantized_call(unit_vectors, reverse=True))
        cap = embedding.logit_soft_cap
        tables.append(
            (logits if cap is None else cap * np.arctanh(logits / cap)).T
        )
    return tables


def table_shape(embedding: Any) -> tuple[int, int]:
    """`(input_dim, output_dim)` of a layer's table, or of an array.

    Raises:
        TypeError: If it is a layer without `embeddings`.
        ValueError: If it is not built, or not a matrix.
    """
    if _is_layer(embedding):
        # Sizes first: reading `embeddings` can cost, and int4 packs columns.
        if hasattr(embedding, "input_dim") and hasattr(embedding, "output_dim"):
            return embedding.input_dim, embedding.output_dim
        embedding = embedding.embeddings
    shape = tuple(np.shape(embedding))
    if len(shape) != 2:
        raise ValueError(
            "`embedding` must be a built embedding layer or a table of shape "
            f"(input_dim, output_dim). Received: embedding of shape {shape}"
        )
    return shape


def to_numpy(table: Any) -> np.ndarray:
    """A tensor, variable or array as a NumPy array, in float32 if a tensor."""
    if isinstance(table, np.ndarray):
        return table
    tensor = ops.cast(table, "float32")
    try:
        # A view: a copy of a large table can be most of a model's memory.
        return np.asarray(memoryview(tensor))
    except (TypeError, BufferError):  # elsewhere, or on several devices
        return ops.convert_to_numpy(tensor)


def float_policy_name(layer: keras.layers.Layer) -> str:
    """The dtype policy of a layer, before quantization if it is quantized."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy[layer.path]
    if policy.name is not None:
        return policy.name.split("_from_")[-1]
    # Keras forgets the names of policies when it saves a map of them.
    if policy.compute_dtype == policy.variable_dtype:
        return policy.compute_dtype
    return f"mixed_{policy.compute_dtype}"


def _is_layer(embedding: Any) -> bool:
    """Whether `embedding` is a layer with a table. Refuses other layers."""
    # Statically, since `embeddings` can be a property that computes a table.
    missing = object()
    static = inspect.getattr_static(embedding, "embeddings", missing)
    if isinstance(embedding, keras.layers.Layer):
        if not embedding.built:
            raise ValueError(
                "`embedding` must be built: call it, or its `build()`, first. "
                f"Received: embedding={embedding}"
            )
        if static is missing:
            raise TypeError(
                "`embedding` must be a layer with an `embeddings` table, or an "
                f"array. Received: embedding={embedding}"
            )
    return static is not missing


def _inherited_options(embedding: Any) -> dict[str, Any]:
    if not _is_layer(embedding):
        return {}
    options = {
        name: getattr(embedding, name)
        for name in _INHERITED_OPTIONS
        if hasattr(embedding, name)
    }
    if hasattr(embedding, "dtype_policy"):
        options["dtype"] = float_policy_name(embedding)
    return options
