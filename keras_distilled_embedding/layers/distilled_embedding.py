"""The layer: an embedding table kept as two factors."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding.factorization import Factorization
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import factorize
from keras_distilled_embedding.factorization import is_lifted
from keras_distilled_embedding.factorization import rank_for_compression
from keras_distilled_embedding.factorization import rank_for_error
from keras_distilled_embedding.factorization import validate_rank
from keras_distilled_embedding.layers._projection_cache import ProjectionCache
from keras_distilled_embedding.layers._quantization import FactorQuantization
from keras_distilled_embedding.quantization import check_quantization
from keras_distilled_embedding.quantization import round_in_place

# What `from_embedding` hands to `factorize`, and to nothing else.
_FACTORIZE_OPTIONS = (
    "method",
    "row_weights",
    "column_weights",
    "sweeps",
    "seed",
    "verbose",
)

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


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class DistilledEmbedding(
    ProjectionCache, FactorQuantization, keras.layers.Layer
):
    """An embedding, and its vocabulary projection, stored as two factors.

    The table `E` of shape `(input_dim, output_dim)` of a
    `keras.layers.ReversibleEmbedding` is replaced by

    ```
    E ~ f(U) W                                     hidden_dim=None
    E ~ f(U) W + g(U A + b) B                      hidden_dim=h
    ```

    with the codes `U (input_dim, rank)`, one row per token, and the basis
    `W (rank, output_dim)`. `f` is `activation` and `g` is
    `hidden_activation`, with `A (rank, h)`, `b (h,)` and `B (h, output_dim)`.

    The table itself is never built by a call. A look-up takes the rows of `U`
    first, and the projection multiplies in rank space,
    `h E^T = (h W^T) f(U)^T`, about `output_dim / rank` times fewer
    multiplications than with the table. With `hidden_dim`, where each call of
    the projection also computes `g(U A + b)` for all tokens, see
    `cache_projection`.

    The layer is called like `keras.layers.ReversibleEmbedding`. To compress a
    trained table, use `DistilledEmbedding.from_embedding`.

    Args:
        input_dim: Integer. Size of the vocabulary, i.e. maximum integer
            index + 1.
        output_dim: Integer. Dimension of the dense embedding.
        rank: Integer. Length of a token's code. Any positive rank is accepted
            here, also one that saves nothing.
        activation: `f`, the activation of the codes. `None` is a plain
            low-rank factorization.
        hidden_dim: Integer or `None`. Width `h` of the second, non-linear
            term; `None` leaves it out.
        tie_weights: Boolean, whether look-up and projection share their
            factors. `False` adds a second set, used with `reverse=True`.
        embeddings_initializer: Initializer for the codes.
        embeddings_regularizer: Regularizer, applied to the codes and to the
            basis, as in regularized matrix factorization. As in
            `keras.layers.ReversibleEmbedding`, the projection of an untied
            layer is not regularized.
        embeddings_constraint: Constraint, applied to the codes (of the
            look-up) only: they are the factor with one row per token.
        mask_zero: Boolean, whether index 0 is padding to be masked out.
        reverse_dtype: The dtype of the reverse projection and of its logits.
            Defaults to the `compute_dtype` of the layer.
        logit_soft_cap: Float or `None`. With `reverse=True`, logits become
            `tanh(logits / logit_soft_cap) * logit_soft_cap`.
        hidden_activation: `g`, the activation of the hidden layer. Only used
            with `hidden_dim`.
        lora_rank: Integer or `None`. If set, the factors are frozen and the
            codes adapted by a trained change of this rank, see `enable_lora`.
        lora_alpha: Float or `None`. Scales that change by
            `lora_alpha / lora_rank`; defaults to `lora_rank`.
        rounding: `"int8"`, `"int4"` or `None`. If set, the layer computes
            with its codes rounded as `export_litert` stores them with that
            `quantization`, so that training takes account of it; backwards,
            rounding is taken for the identity. Not with `hidden_dim`.
        **kwargs: Base layer arguments, such as `name`, `trainable`, `dtype`.

    Call arguments:
        inputs: Integer tensor `(...)` of indices; with `reverse=True`, a
            float tensor `(..., output_dim)`.
        reverse: Boolean, whether to project from `output_dim` to `input_dim`
            instead of looking rows up. Defaults to `False`.

    Returns:
        A tensor `(..., output_dim)` in the compute dtype; with `reverse=True`,
        logits `(..., input_dim)` in `reverse_dtype`. With `mask_zero=True`
        a look-up attaches the mask `inputs != 0`. With `reverse=True` the mask
        of the inputs is kept.

    Raises:
        TypeError: If `inputs` are not integers, or not floats with
            `reverse=True`.
        ValueError: If `reverse=True` and the last dimension of `inputs` is not
            `output_dim`.

    Example:

    ```python
    layer = DistilledEmbedding(input_dim=1000, output_dim=64, rank=8)
    token_ids = np.random.randint(1000, size=(16, 50))
    hidden_states = layer(token_ids)  # (16, 50, 64)
    logits = layer(hidden_states, reverse=True)  # (16, 50, 1000)
    layer.compression_ratio  # 7.52

    # Or start from the table of a trained layer.
    embedding = keras.layers.Embedding(1000, 64)
    embedding.build()
    layer = DistilledEmbedding.from_embedding(embedding, compression=4.0)
    ```

    References:
    - [Lioutas et al., 2019](https://arxiv.org/abs/1910.06720)
    - [Press and Wolf, 2016](https://arxiv.org/abs/1608.05859)
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        rank: int,
        activation: str | Callable | None = "relu",
        hidden_dim: int | None = None,
        tie_weights: bool = True,
        embeddings_initializer: Any = "uniform",
        embeddings_regularizer: Any = None,
        embeddings_constraint: Any = None,
        mask_zero: bool = False,
        reverse_dtype: str | None = None,
        logit_soft_cap: float | None = None,
        hidden_activation: str | Callable | None = "gelu",
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        rounding: str | None = None,
        **kwargs: Any,
    ) -> None:
        input_dim = _check_size("input_dim", input_dim)
        output_dim = _check_size("output_dim", output_dim)
        rank = _check_size("rank", rank)
        if hidden_dim is not None:
            hidden_dim = _check_size("hidden_dim", hidden_dim)
        if lora_rank is not None:
            lora_rank = _check_size("lora_rank", lora_rank)
        check_quantization("rounding", rounding)
        if rounding is not None and hidden_dim is not None:
            raise ValueError(
                "`rounding` is of codes that are stored after their "
                "activation, which those of a layer with `hidden_dim` are "
                f"not. Received: quantization={rounding!r}, "
                f"hidden_dim={hidden_dim}"
            )
        if logit_soft_cap is not None:
            _check_soft_cap(logit_soft_cap)
        if reverse_dtype is not None:
            reverse_dtype = _check_float_dtype("reverse_dtype", reverse_dtype)
        super().__init__(**kwargs)
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.rank = rank
        self.activation = keras.activations.get(activation)
        self.hidden_dim = hidden_dim
        self.hidden_activation = keras.activations.get(hidden_activation)
        self.tie_weights = tie_weights
        self.embeddings_initializer = keras.initializers.get(
            embeddings_initializer
        )
        self.embeddings_regularizer = keras.regularizers.get(
            embeddings_regularizer
        )
        self.embeddings_constraint = keras.constraints.get(
            embeddings_constraint
        )
        self.mask_zero = mask_zero
        self.reverse_dtype = reverse_dtype
        self.logit_soft_cap = logit_soft_cap
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha if lora_alpha is not None else lora_rank
        self.lora_enabled = False
        self.quantization = rounding
        self.supports_masking = True
        # Neither the inputs nor (in `add_weight`) the factors: `_read` casts,
        # after taking the rows, and to `reverse_dtype` where that is wanted.
        self.autocast = False

    # Weights

    def build(self, input_shape: Any = None) -> None:
        if self.built:
            return
        if self.quantization_mode is not None:
            self.quantized_build(input_shape, self.quantization_mode)
        else:
            self._build_factors()
        self.built = True
        if self.lora_rank is not None:
            self.enable_lora(self.lora_rank, self.lora_alpha)

    def _build_factors(self) -> None:
        initializers = {
            "codes": self.embeddings_initializer,
            # With fan_in = rank, "he" keeps the variance through ReLU: the
            # table has the scale that `embeddings_initializer` asks for.
            "basis": "he_normal",
            "hidden_kernel": "lecun_normal",
            "hidden_bias": "zeros",
            # Starts small: the first term carries the table, and the second
            # one grows from there.
            "hidden_basis": keras.initializers.RandomNormal(stddev=0.01),
        }
        regularizers = dict.fromkeys(
            ("codes", "basis"), self.embeddings_regularizer
        )
        constraints = {"codes": self.embeddings_constraint}
        for name, shape in self._factor_shapes().items():
            initializer = keras.initializers.get(
                initializers[name.removeprefix("reverse_")]
            )
            if hasattr(initializer, "clone"):
                # An unseeded initializer repeats itself; its clones differ.
                initializer = initializer.clone()
            variable = self.add_weight(
                name=name,
                shape=shape,
                initializer=initializer,
                regularizer=regularizers.get(name),
                constraint=constraints.get(name),
                autocast=False,
            )
            setattr(self, name, variable)

    def _factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every factor, in the order they are saved."""
        shapes = {
            "codes": (self.input_dim, self.rank),
            "basis": (self.rank, self.output_dim),
        }
        if self.hidden_dim is not None:
            shapes["hidden_kernel"] = (self.rank, self.hidden_dim)
            shapes["hidden_bias"] = (self.hidden_dim,)
            shapes["hidden_basis"] = (self.hidden_dim, self.output_dim)
        if not self.tie_weights:
            shapes |= {f"reverse_{name}": s for name, s in shapes.items()}
        return shapes

    def set_factors(
        self, factors: Factorization, reverse: Factorization | None = None
    ) -> None:
        """Assigns the result of `factorize` to the built layer.

        Args:
            factors: The factors of the table, of this layer's shapes.
            reverse: The factors of the projection's table, of shape
                `(input_dim, output_dim)` too, for an untied layer.

        Raises:
            ValueError: If the layer is not built or is quantized, if a shape
                differs, or if `reverse` does not go with `tie_weights`.
        """
        if not self.built or self.quantization_mode is not None:
            raise ValueError(
                "`set_factors` needs a built layer with float factors. "
                f"Received: layer '{self.name}' with built={self.built}, "
                f"quantization_mode={self.quantization_mode}"
            )
        if self.tie_weights != (reverse is None):
            raise ValueError(
                "`reverse` goes with `tie_weights=False`, and only with it. "
                f"Received: tie_weights={self.tie_weights}, "
                f"reverse={'None' if reverse is None else 'given'}"
            )
        values = {}
        for name, shape in self._factor_shapes().items():
            source = reverse if name.startswith("reverse_") else factors
            value = getattr(source, name.removeprefix("reverse_"), None)
            if np.shape(value) != shape:
                raise ValueError(
                    f"`{name}` must have shape {shape}. "
                    f"Received: {name} of shape {np.shape(value)}"
                )
            values[name] = value
        self.drop_projection_cache()
        for name, value in values.items():
            getattr(self, name).assign(value)

    def with_activation_applied(self) -> DistilledEmbedding:
        """A layer that computes the same, with `f(U)` in place of `U`.

        For inference: a graph that applies `f` to constant codes makes
        converters keep them twice. With `hidden_dim` the second
        term needs `U` itself, so there the activation stays. LoRA weights are
        merged, quantized factors become floats.

        Returns:
            A new, built layer of the same name.
        """
        applies = self.hidden_dim is None
        config = self.get_config()
        config |= {
            "dtype": float_policy_name(self),
            "lora_rank": None,
            "lora_alpha": None,
            "rounding": None,
        }
        if applies:
            config["activation"] = None
        layer = type(self).from_config(config)
        layer.build()
        for name in self._factor_shapes():
            if applies and name.endswith("codes"):
                prefix = name.removesuffix("codes")
                value = self._features(self.variable_dtype, prefix=prefix)
            else:
                value = self._read(name, self.variable_dtype)
            getattr(layer, name).assign(value)
        return layer

    def stored_factors(self, prefix: str = "") -> tuple[Any, Any]:
        """Codes `f(U)` and basis `W`, unrounded, for a file of integers.

        Args:
            prefix: `"reverse_"` for the projection's own, where it has some.

        Returns:
            Float32 tensors `(input_dim, rank)` and `(rank, output_dim)`.

        Raises:
            ValueError: If the layer has a `hidden_dim`: its table is not the
                product of two matrices.
        """
        if self.hidden_dim is not None:
            raise ValueError(
                "A layer with `hidden_dim` cannot be stored as integers. "
                f"Received: layer '{self.name}' with "
                f"hidden_dim={self.hidden_dim}"
            )
        codes = self._read(f"{prefix}codes", "float32")
        return self.activation(codes), self._read(f"{prefix}basis", "float32")

    # Call

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        self._check_inputs(inputs, reverse)
        if not reverse:
            if keras.backend.standardize_dtype(inputs.dtype) != "int64":
                inputs = ops.cast(inputs, "int32")
            dtype = self.compute_dtype
            return ops.matmul(self._features(dtype, inputs), self._basis(dtype))
        states, features = self.rank_space(inputs)
        logits = ops.matmul(states, ops.transpose(features))
        if self.logit_soft_cap is not None:
            logits = ops.multiply(
                ops.tanh(ops.divide(logits, self.logit_soft_cap)),
                self.logit_soft_cap,
            )
        return logits

    def rank_space(self, inputs: Any) -> tuple[Any, Any]:
        """The two factors of the projection's logits, before any soft cap.

        Args:
            inputs: Hidden states `(..., output_dim)`.

        Returns:
            States `(..., k)` and features `(input_dim, k)`, both in the dtype
            of the logits: these are `states @ transpose(features)`. `k` is
            `rank`, with `hidden_dim` `rank + hidden_dim`.
        """
        prefix = "" if self.tie_weights else "reverse_"
        dtype = self._output_dtype(reverse=True)
        states = ops.matmul(
            ops.cast(inputs, dtype), ops.transpose(self._basis(dtype, prefix))
        )
        return states, self._projection_features(dtype, prefix)

    def _features(self, dtype: str, ids: Any = None, prefix: str = "") -> Any:
        """`[f(U), g(U A + b)]` for all tokens, or for `ids`."""
        if self.quantization is not None:
            # Of all tokens: how one is rounded depends on the others.
            features = round_in_place(
                *self.stored_factors(prefix), self.quantization
            )
            if ids is not None:
                features = ops.take(features, ids, axis=0)
            return ops.cast(features, dtype)
        codes = self._read(f"{prefix}codes", dtype, ids)
        features = self.activation(codes)
        if self.hidden_dim is None:
            return features
        hidden = ops.add(
            ops.matmul(codes, self._read(f"{prefix}hidden_kernel", dtype)),
            self._read(f"{prefix}hidden_bias", dtype),
        )
        return ops.concatenate(
            [features, self.hidden_activation(hidden)], axis=-1
        )

    def _basis(self, dtype: str, prefix: str = "") -> Any:
        """`[W; B]`: what the features are multiplied with."""
        basis = self._read(f"{prefix}basis", dtype)
        if self.hidden_dim is None:
            return basis
        hidden_basis = self._read(f"{prefix}hidden_basis", dtype)
        return ops.concatenate([basis, hidden_basis], axis=0)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        # Keras does not tell this method about `reverse`; the dtype does.
        if not keras.backend.is_int_dtype(inputs.dtype):
            return previous_mask
        return ops.not_equal(inputs, 0) if self.mask_zero else None

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...], reverse: bool = False
    ) -> tuple[int | None, ...]:
        if reverse:
            return (*input_shape[:-1], self.input_dim)
        return (*input_shape, self.output_dim)

    def compute_output_spec(
        self, inputs: keras.KerasTensor, reverse: bool = False
    ) -> keras.KerasTensor:
        self._check_inputs(inputs, reverse)
        return keras.KerasTensor(
            self.compute_output_shape(inputs.shape, reverse=reverse),
            dtype=self._output_dtype(reverse),
        )

    def _output_dtype(self, reverse: bool) -> str:
        if reverse and self.reverse_dtype is not None:
            return self.reverse_dtype
        return self.compute_dtype

    def _check_inputs(self, inputs: Any, reverse: bool) -> None:
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        if not reverse:
            if not keras.backend.is_int_dtype(dtype):
                raise TypeError(
                    "`inputs` must be integer indices. For a symbolic input "
                    'use `keras.Input(shape, dtype="int32")`; to project '
                    "hidden states to the vocabulary pass `reverse=True`. "
                    f"Received: inputs of dtype {dtype}"
                )
            return
        if not keras.backend.is_float_dtype(dtype):
            raise TypeError(
                "With `reverse=True`, `inputs` must be floating-point hidden "
                f"states. Received: inputs of dtype {dtype}"
            )
        last = inputs.shape[-1] if len(inputs.shape) else 0
        if last is not None and last != self.output_dim:
            raise ValueError(
                "With `reverse=True`, the last dimension of `inputs` must be "
                f"output_dim={self.output_dim}. "
                f"Received: inputs of shape {tuple(inputs.shape)}"
            )

    # The table

    @property
    def embeddings(self) -> Any:
        """The reconstructed table, `(input_dim, output_dim)`.

        A tensor in the variable dtype, computed at every access.
        """
        return self.reconstruct()

    @property
    def reverse_embeddings(self) -> Any:
        """The reconstructed kernel of an untied layer's projection.

        `(output_dim, input_dim)`, as in `keras.layers.ReversibleEmbedding`.
        """
        if self.tie_weights:
            raise AttributeError(
                "`reverse_embeddings` exists with `tie_weights=False` only; "
                "the projection of this layer uses `embeddings`."
            )
        return ops.transpose(self.reconstruct(reverse=True))

    def reconstruct(self, ids: Any = None, *, reverse: bool = False) -> Any:
        """Rows of the table that the factors stand for.

        Args:
            ids: Integer tensor of row numbers; `None` for all rows.
            reverse: Whether to take the projection's table, which is another
                one where the weights are not tied.

        Returns:
            A tensor `(..., output_dim)`, or `(input_dim, output_dim)`, in the
            variable dtype.
        """
        if not self.built:
            raise AttributeError(
                "The layer has no embeddings before it is built. Call "
                f"`build()` first. Received: layer '{self.name}'"
            )
        prefix = "reverse_" if reverse and not self.tie_weights else ""
        dtype = self.variable_dtype
        return ops.matmul(
            self._features(dtype, ids, prefix), self._basis(dtype, prefix)
        )

    def __dir__(self) -> list[str]:
        # Saving and loading read every attribute that `dir` lists, and these
        # would each time compute a table that can be larger than the model.
        hidden = ("embeddings", "reverse_embeddings")
        return [name for name in super().__dir__() if name not in hidden]

    @property
    def compression_ratio(self) -> float:
        """Parameters of the dense table(s) divided by those of the factors."""
        tables = 1 if self.tie_weights else 2
        own = sum(math.prod(shape) for shape in self._factor_shapes().values())
        return tables * self.input_dim * self.output_dim / own

    # Construction

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "input_dim": self.input_dim,
                "output_dim": self.output_dim,
                "rank": self.rank,
                "activation": keras.activations.serialize(self.activation),
                "hidden_dim": self.hidden_dim,
                "tie_weights": self.tie_weights,
                "embeddings_initializer": keras.initializers.serialize(
                    self.embeddings_initializer
                ),
                "embeddings_regularizer": keras.regularizers.serialize(
                    self.embeddings_regularizer
                ),
                "embeddings_constraint": keras.constraints.serialize(
                    self.embeddings_constraint
                ),
                "mask_zero": self.mask_zero,
                "reverse_dtype": self.reverse_dtype,
                "logit_soft_cap": self.logit_soft_cap,
                "hidden_activation": keras.activations.serialize(
                    self.hidden_activation
                ),
                "lora_rank": self.lora_rank,
                "lora_alpha": self.lora_alpha,
                "rounding": self.quantization,
            }
        )
        return config

    @classmethod
    def from_embedding(
        cls,
        embedding: Any,
        rank: int | None = None,
        compression: float | None = None,
        max_error: float | None = None,
        **kwargs: Any,
    ) -> DistilledEmbedding:
        """Factorizes a trained embedding.

        Args:
            embedding: A built `keras.layers.Embedding` or
                `keras.layers.ReversibleEmbedding`, a subclass of one or
                another layer with `embeddings`; or a table
                `(input_dim, output_dim)`. The effective table of a layer is
                used, with its LoRA weights merged and dequantized. An untied
                layer has both of its tables factorized.
            rank: Integer, the rank. Give one of this, `compression` and
                `max_error`.
            compression: Float, how many times fewer parameters the layer has
                at least. The largest such rank is taken.
            max_error: Float in (0, 1), the share of the table's energy that
                the factors may lose. The smallest rank is taken whose exact
                factors are as good.
            **kwargs: Options of `factorize` (`method`, `row_weights`,
                `column_weights`, `sweeps`, `seed`, `verbose`) and arguments
                of this layer, `activation`, `hidden_dim` and
                `hidden_activation` among them. A layer hands down its name,
                dtype policy (the float one, if quantized), `trainable`,
                `mask_zero`, `tie_weights`, `reverse_dtype`, `logit_soft_cap`
                and regularizers, unless given here. It does not hand down its
                initializer and constraint, which are for rows of the table.

        Returns:
            A built layer with the factors assigned.

        Raises:
            TypeError: If `embedding` is a layer without `embeddings`.
            ValueError: If the layer is not built, the table is not of rank 2
                or not finite, if not exactly one of `rank`, `compression` and
                `max_error` is given, or if the table would not get smaller.

        Example:

        ```python
        embedding = keras.layers.ReversibleEmbedding(1000, 64)
        embedding.build()
        layer = DistilledEmbedding.from_embedding(embedding, compression=4.0)
        layer.compression_ratio  # 4.01
        ```
        """
        options = {k: kwargs.pop(k) for k in _FACTORIZE_OPTIONS if k in kwargs}
        _check_one_size(rank=rank, compression=compression, max_error=max_error)
        tables = None
        if max_error is not None:
            tables = embedding_tables(embedding)
            rank = _rank_for_error(tables, max_error, options, kwargs)
        layer = cls.like(embedding, rank, compression, **kwargs)
        options |= {
            k: kwargs[k]
            for k in ("activation", "hidden_dim", "hidden_activation")
            if k in kwargs
        }
        table, reverse_table = tables or embedding_tables(embedding)
        factors = factorize(table, layer.rank, **options)
        reverse = None
        if not layer.tie_weights:
            reverse = factors
            if reverse_table is not None:
                reverse = factorize(reverse_table, layer.rank, **options)
        layer.set_factors(factors, reverse)
        return layer

    @classmethod
    def like(
        cls,
        embedding: Any,
        rank: int | None = None,
        compression: float | None = None,
        **kwargs: Any,
    ) -> DistilledEmbedding:
        """The first, cheap half of `from_embedding`.

        Checks the arguments and builds the layer that would replace
        `embedding`, its factors still random. `set_factors` fills it.

        Args:
            embedding: As in `from_embedding`.
            rank: As in `from_embedding`.
            compression: As in `from_embedding`.
            **kwargs: Arguments of this layer.

        Returns:
            A built layer.
        """
        shape = _table_shape(embedding)
        options = _inherited_options(embedding) | kwargs
        rank = _choose_rank(*shape, rank, compression, kwargs.get("hidden_dim"))
        layer = cls(*shape, rank, **options)
        layer.build()
        return layer


def embedding_tables(embedding: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """The effective tables of an embedding layer, or of an array.

    Args:
        embedding: A built embedding layer or a table.

    Returns:
        The table of the look-up and, if it is another one, that of the
        projection; both `(input_dim, output_dim)`, LoRA weights merged and
        dequantized.
    """
    if not _is_layer(embedding):
        return to_numpy(embedding), None
    untied = not getattr(embedding, "tie_weights", True)
    if getattr(embedding, "quantization_mode", None) is None:
        reverse = to_numpy(embedding.reverse_embeddings).T if untied else None
        return to_numpy(embedding.embeddings), reverse
    # Quantized variables mean nothing without their scales, so ask the layer
    # for what it computes. Not through `__call__`, which would record losses.
    ids = ops.arange(embedding.input_dim, dtype="int32")
    table = to_numpy(embedding.quantized_call(ids))
    if not untied:
        return table, None
    basis_vectors = ops.eye(embedding.output_dim, dtype=embedding.compute_dtype)
    reverse = to_numpy(embedding.quantized_call(basis_vectors, reverse=True)).T
    if embedding.logit_soft_cap is not None:
        cap = embedding.logit_soft_cap
        reverse = cap * np.arctanh(reverse / cap)
    return table, reverse


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


def _table_shape(embedding: Any) -> tuple[int, int]:
    if _is_layer(embedding):
        # Sizes first: reading `embeddings` can cost, and int4 packs columns.
        sizes = (
            getattr(embedding, "input_dim", None),
            getattr(embedding, "output_dim", None),
        )
        if None not in sizes:
            return sizes
        embedding = embedding.embeddings
    shape = tuple(np.shape(embedding))
    if len(shape) != 2:
        raise ValueError(
            "`embedding` must be a built embedding layer or a table of shape "
            f"(input_dim, output_dim). Received: embedding of shape {shape}"
        )
    return shape


def to_numpy(table: Any) -> np.ndarray:
    if isinstance(table, np.ndarray):
        return table
    tensor = ops.cast(table, "float32")
    try:
        # A view: a copy of a large table can be most of a model's memory.
        return np.asarray(memoryview(tensor))
    except (TypeError, BufferError):  # elsewhere, or on several devices
        return ops.convert_to_numpy(tensor)


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


def float_policy_name(layer: Any) -> str:
    """The dtype policy of a layer, before quantization if it is quantized."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy[layer.path]
    return policy.name.split("_from_")[-1]


def _check_one_size(**sizes: Any) -> None:
    """Refuses none, and more than one, of the ways to tell the size."""
    if sum(size is not None for size in sizes.values()) != 1:
        *names, last = (f"`{name}`" for name in sizes)
        raise ValueError(
            f"Give exactly one of {', '.join(names)} and {last}. Received: "
            + ", ".join(f"{name}={size}" for name, size in sizes.items())
        )


def _choose_rank(
    input_dim: int,
    output_dim: int,
    rank: int | None,
    compression: float | None,
    hidden_dim: int | None,
) -> int:
    _check_one_size(rank=rank, compression=compression)
    if compression is None:
        validate_rank(rank, input_dim, output_dim, hidden_dim)
        return rank
    return rank_for_compression(input_dim, output_dim, compression, hidden_dim)


def _rank_for_error(
    tables: tuple[np.ndarray, np.ndarray | None],
    max_error: float,
    options: dict[str, Any],
    layer_options: dict[str, Any],
) -> int:
    lifted = is_lifted(layer_options.get("activation", "relu"))
    weights = options.get("row_weights"), options.get("column_weights")
    return max(
        rank_for_error(Table.of(table, *weights), max_error, lifted)
        for table in tables
        if table is not None
    )


def _check_size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be a positive integer. Received: {name}={value!r}"
        )
    if value < 1:
        raise ValueError(
            f"`{name}` must be a positive integer. Received: {name}={value!r}"
        )
    return int(value)


def _check_soft_cap(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            "`logit_soft_cap` must be a positive number or None. "
            f"Received: logit_soft_cap={value!r}"
        )
    if not value > 0:
        raise ValueError(
            "`logit_soft_cap` must be a positive number or None. "
            f"Received: logit_soft_cap={value!r}"
        )


def _check_float_dtype(name: str, value: Any) -> str:
    dtype = keras.backend.standardize_dtype(value)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(
            f"`{name}` must be a floating-point dtype. "
            f"Received: {name}={value!r}"
        )
    return dtype
