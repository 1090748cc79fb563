"""The layer: an embedding table kept as two factors and an offset."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding._utils.arguments import as_optional_integer
from keras_distilled_embedding._utils.arguments import as_positive_number
from keras_distilled_embedding.layers.conversion import factorized_layer
from keras_distilled_embedding.layers.conversion import factors_of
from keras_distilled_embedding.layers.conversion import float_policy_name
from keras_distilled_embedding.layers.conversion import round_layer
from keras_distilled_embedding.layers.lora import LoraCodes
from keras_distilled_embedding.quantization import QUANTIZATIONS
from keras_distilled_embedding.quantization import Format
from keras_distilled_embedding.quantization import check_quantization
from keras_distilled_embedding.quantization import format_of
from keras_distilled_embedding.sizes import factor_bytes

# The largest whole number below which a dtype holds all of them.
_EXACT_BELOW = {"bfloat16": 2**8, "float16": 2**11, "float32": 2**24}


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class DistilledEmbedding(LoraCodes, keras.layers.Layer):
    """An embedding, and its vocabulary projection, stored as factors.

    The table `E` of shape `(input_dim, output_dim)` of a
    `keras.layers.ReversibleEmbedding` is replaced by

    ```
    E ~ f(U) W + 1 c
    ```

    with the codes `U (input_dim, rank)`, one row per token, the basis
    `W (rank, output_dim)` and the offset `c (output_dim,)`; `f` is
    `activation`. Trained are `U`, `W` and `c` of

    ```
    E ~ (f(U) - 1 m) R W + 1 c
    ```

    which is the same form: around a fixed center `m (rank,)` and, with a
    `quantization`, by a fixed rotation `R (rank, rank)` from the principal
    components of the codes, an optimizer such as Adam gets further in as many
    steps. `m` is there with `centered` or a `quantization`.

    The table itself is never built by a call. A look-up takes the rows of `U`
    first, and the projection multiplies in rank space,
    `h E^T = (h W^T) f(U)^T + h c`, about `output_dim / rank` times fewer
    multiplications than with the table.

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
        use_bias: Boolean, whether there is an offset `c`. `False` is the
            published form. In the projection an offset adds the same number
            to all logits of a position, which no softmax sees.
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
        quantization: `"int8"`, `"int4"`, `"int2"` or `None`. If set, the layer
            computes with `f(U)` rounded as a file of that kind stores it,
            `1 m + s * integers`, so that training takes account of it;
            backward, rounding is taken for the identity (a straight-through
            gradient). The scales `s` of 4 and 2 bits are trained too.
        row_scales: Boolean, whether each row of codes in 4 or 2 bits has a
            scale of its own. It takes 2 bytes a row in 4 bits and 12 in 2, and
            loses less; otherwise each column has one, which takes none. Codes
            in 8 bits have one a column.
        centered: Boolean, whether there is a center `m`, zeros in a new layer,
            the mean of `f(U)` in one made from a table. It needs an offset.
        lora_rank: Integer or `None`. If set, the factors are frozen and the
            codes adapted by a trained change of this rank, see `enable_lora`.
        lora_alpha: Float or `None`. Scales that change by
            `lora_alpha / lora_rank`; defaults to `lora_rank`.
        **kwargs: Base layer arguments, such as `name`, `trainable`, `dtype`.

    Call arguments:
        inputs: Integer tensor `(...)` of indices (floats are cast, as in
            Keras), which may be ragged or sparse; with `reverse=True`, a float
            tensor `(..., output_dim)`.
        reverse: Boolean, whether to project from `output_dim` to `input_dim`
            instead of looking rows up. Defaults to `False`.

    Returns:
        A tensor `(..., output_dim)` in the compute dtype; with `reverse=True`,
        logits `(..., input_dim)` in `reverse_dtype`. With `mask_zero=True`
        a look-up attaches the mask `inputs != 0`. With `reverse=True` the mask
        of the inputs is kept.

    Raises:
        TypeError: If `inputs` are not numbers, or not floats with
            `reverse=True`.
        ValueError: If `reverse=True` and the last dimension of `inputs` is not
            `output_dim`.

    Example:

    ```python
    layer = DistilledEmbedding(input_dim=1000, output_dim=64, rank=8)
    token_ids = np.random.randint(1000, size=(16, 50))
    hidden_states = layer(token_ids)  # (16, 50, 64)
    logits = layer(hidden_states, reverse=True)  # (16, 50, 1000)
    layer.compression_ratio  # 7.46

    # Or start from the table of a trained layer.
    embedding = keras.layers.Embedding(1000, 64)
    embedding.build()
    layer = DistilledEmbedding.from_embedding(embedding, compression=4.0)
    ```

    References:
    - [Lioutas et al., 2019](https://arxiv.org/abs/1910.06720)
    - [Press and Wolf, 2016](https://arxiv.org/abs/1608.05859)
    """

    # Keras has no type hints of its own.
    built: bool
    dtype_policy: Any

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        rank: int,
        activation: str | Callable | None = "relu",
        use_bias: bool = True,
        tie_weights: bool = True,
        embeddings_initializer: Any = "uniform",
        embeddings_regularizer: Any = None,
        embeddings_constraint: Any = None,
        mask_zero: bool = False,
        reverse_dtype: str | None = None,
        logit_soft_cap: float | None = None,
        quantization: str | None = None,
        row_scales: bool = True,
        centered: bool = False,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        **kwargs: Any,
    ) -> None:
        input_dim = as_integer("input_dim", input_dim)
        output_dim = as_integer("output_dim", output_dim)
        rank = as_integer("rank", rank)
        lora_rank = as_optional_integer("lora_rank", lora_rank)
        check_quantization("quantization", quantization)
        if logit_soft_cap is not None:
            as_positive_number("logit_soft_cap", logit_soft_cap)
        if reverse_dtype is not None:
            reverse_dtype = _check_float_dtype("reverse_dtype", reverse_dtype)
        if centered and not use_bias:
            raise ValueError(
                "`centered` needs an offset: leave it out, or pass "
                "`use_bias=True`. Received: centered=True, use_bias=False"
            )
        super().__init__(**kwargs)
        # Keras put a wrapper in front of it, which refuses modes that are not
        # its own.
        self.__dict__.pop("quantize", None)
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.rank = rank
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
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
        self.quantization = quantization
        self.row_scales = row_scales
        self.centered = centered
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha if lora_alpha is not None else lora_rank
        self.lora_enabled = False
        self.supports_masking = True
        # Neither the inputs nor (in `add_weight`) the factors: `_read` casts,
        # after taking the rows, and to `reverse_dtype` where that is asked.
        self.autocast = False
        if self.dtype_policy.quantization_mode is not None:
            self._set_quantization(self.dtype_policy.quantization_mode)

    # Weights

    def build(self, input_shape: Any = None) -> None:
        if self.built:
            return
        initializers = {
            "codes": self.embeddings_initializer,
            # With fan_in = rank, "he" keeps the variance through ReLU: the
            # table has the scale that `embeddings_initializer` asks for.
            "basis": "he_normal",
            "offset": "zeros",
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
        self._add_frames()
        self.built = True
        if self.lora_rank is not None:
            self.enable_lora(self.lora_rank, self.lora_alpha)

    def _factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every factor, in the order they are saved."""
        shapes: dict[str, tuple[int, ...]] = {
            "codes": (self.input_dim, self.rank),
            "basis": (self.rank, self.output_dim),
        }
        if self.use_bias:
            shapes["offset"] = (self.output_dim,)
        return self._with_reverse(shapes)

    def _frame_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same of what the codes are rounded to, and trained in."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.format is not None:
            by_row = self.format.has_row_scales
            shapes["scales"] = (self.input_dim, 1) if by_row else (1, self.rank)
            shapes["rotation"] = (self.rank, self.rank)
        if self.centered or self.format is not None:
            shapes["center"] = (self.rank,)
        return self._with_reverse(shapes)

    def _saved_names(self) -> list[str]:
        """Names of all variables, in the order they are saved."""
        return [*self._factor_shapes(), *self._frame_shapes()]

    def _with_reverse(self, shapes: dict[str, Any]) -> dict[str, Any]:
        if self.tie_weights:
            return shapes
        return shapes | {f"reverse_{name}": s for name, s in shapes.items()}

    def _add_frames(self) -> None:
        """Adds the variables of what the codes are rounded to."""
        trained: tuple[str, ...] = ()
        dtype = None
        if self.format is not None:
            dtype = "float32"  # as a file holds them, whatever the policy
            # Steps of 8 bits are so small that an optimizer overshoots.
            if self.format.bits < 8:
                # LoRA freezes what it adapts.
                own = () if self.lora_enabled else ("scales",)
                trained = (*own, "reverse_scales")
        for name, shape in self._frame_shapes().items():
            variable = self.add_weight(
                name=name,
                shape=shape,
                # Of the codes as they are when the variable is made.
                initializer=functools.partial(self._frame, name),
                dtype=dtype,
                trainable=name in trained,
                autocast=False,
            )
            setattr(self, name, variable)

    def _frame(self, name: str, shape: Any, dtype: Any = None) -> Any:
        prefix = "reverse_" if name.startswith("reverse_") else ""
        if name.endswith("rotation"):
            return ops.eye(self.rank, dtype="float32")
        if self.format is None:
            return ops.zeros(shape, dtype)
        codes = self._read(f"{prefix}codes", "float32")  # what LoRA adds, too
        center, scales = self.format.grid(self.activation(codes))
        return scales if name.endswith("scales") else center

    @property
    def format(self) -> Format | None:
        """The storage format of the codes, `None` for floats."""
        if self.quantization is None:
            return None
        return format_of(self.quantization, self.row_scales)

    def quantize(
        self,
        mode: str | None = None,
        type_check: bool = True,
        config: Any = None,
    ) -> None:
        """Computes from now on with codes rounded as a file stores them.

        The weights stay floats and can still be trained, `export_litert`
        stores integers. Codes and basis are put into coordinates in which
        rounding loses least. `model.quantize("int8")` calls this.

        Args:
            mode: Name of a storage format, `"int8"`, `"int4"` or `"int2"`;
                `model.quantize` refuses the last, which is not one of Keras's.
            type_check: Part of Keras's signature; subclasses are quantized
                like the layer itself.
            config: Optional `keras.quantizers.Int8QuantizationConfig`. Its
                activation quantizer has nothing to act on.

        Raises:
            NotImplementedError: For any other of Keras's modes.
            ValueError: If the layer is not built, if Keras has no such mode
                either, or if the config has a weight quantizer: a storage
                format says how it rounds.
        """
        if config is not None and config.weight_quantizer is not None:
            raise ValueError(
                "A storage format says how codes are rounded: leave "
                "`weight_quantizer` unset. Received: config.weight_quantizer="
                f"{config.weight_quantizer}"
            )
        if mode is None and config is not None:
            mode = config.mode
        # What Keras's wrapper checks. It does not know of two bits, for which
        # all holds that does of four.
        self._check_quantize_args(
            "int4" if mode == "int2" else mode, self.compute_dtype
        )
        self._set_quantization(mode)

    def _set_quantization(self, mode: str | None) -> None:
        """The same for a layer not yet built, which Keras would refuse."""
        if mode not in QUANTIZATIONS:
            raise NotImplementedError(
                f"Layer {type(self).__name__} can be quantized to one of "
                f"{QUANTIZATIONS}. Received: mode={mode!r}"
            )
        if self.dtype_policy.quantization_mode is not None:
            self.dtype_policy = float_policy_name(self)
        if mode == self.quantization:
            return
        if not self.built:
            self.quantization = mode
            return
        factors = factors_of(self)
        self._tracker.unlock()
        for name in self._frame_shapes():
            self._untrack_variable(getattr(self, name))
        self.quantization = mode
        self._add_frames()
        self._tracker.lock()
        round_layer(self, factors)

    # Call

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        self._check_inputs(inputs, reverse)
        if not reverse:
            return self._look_up(inputs)
        states, features, shift = self.rank_space(inputs)
        logits = ops.matmul(states, ops.transpose(features))
        if shift is not None:
            # The shift first: Keras on TensorFlow takes a second operand of
            # the logits' last size for a bias, whatever its axis.
            logits = ops.add(ops.expand_dims(shift, -1), logits)
        if self.logit_soft_cap is not None:
            logits = ops.multiply(
                ops.tanh(ops.divide(logits, self.logit_soft_cap)),
                self.logit_soft_cap,
            )
        return logits

    def _look_up(self, inputs: Any) -> Any:
        if hasattr(inputs, "with_flat_values"):  # TensorFlow's ragged tensors
            return inputs.with_flat_values(self._look_up(inputs.flat_values))
        # Sparse ids are 0 where nothing is stored, as in Keras.
        ids = ops.convert_to_tensor(inputs, sparse=False)
        if keras.backend.standardize_dtype(ids.dtype) != "int64":
            ids = ops.cast(ids, "int32")
        rows = self._rows(self.compute_dtype, ids)
        if self.mask_zero:
            # Here, where it is known that these are ids.
            keras_internals.set_mask(rows, ops.not_equal(ids, 0))
        return rows

    def rank_space(self, inputs: Any) -> tuple[Any, Any, Any]:
        """What the projection's logits are made of, before any soft cap.

        Args:
            inputs: Hidden states `h (..., output_dim)`.

        Returns:
            States `h (R W)^T (..., rank)`, features `f(U) - 1 m`, of shape
            `(input_dim, rank)`, and shift `h c (...)`, or `None` without an
            offset, in the dtype of the logits: these are
            `states @ features^T + shift`.
        """
        prefix = "" if self.tie_weights else "reverse_"
        dtype = self._output_dtype(reverse=True)
        inputs = ops.cast(inputs, dtype)
        basis = self._basis(dtype, prefix)
        shift = None
        if self.use_bias:
            offset = self._read(f"{prefix}offset", dtype)
            shift = ops.matmul(inputs, offset)
        states = ops.matmul(inputs, ops.transpose(basis))
        return states, self._features(dtype, prefix=prefix), shift

    def _rows(self, dtype: str, ids: Any = None, prefix: str = "") -> Any:
        """`(f(U) - 1 m) R W + 1 c` for all tokens, or for `ids`."""
        rows = ops.matmul(
            self._features(dtype, ids, prefix), self._basis(dtype, prefix)
        )
        if not self.use_bias:
            return rows
        return ops.add(rows, self._read(f"{prefix}offset", dtype))

    def _basis(self, dtype: str, prefix: str = "") -> Any:
        """`R W`."""
        name = f"{prefix}basis"
        if self.format is None:
            return self._read(name, dtype)
        rotation = ops.convert_to_tensor(getattr(self, f"{prefix}rotation"))
        basis = ops.matmul(rotation, self._read(name, "float32"))
        return ops.cast(basis, dtype)

    def _features(self, dtype: str, ids: Any = None, prefix: str = "") -> Any:
        """`f(U) - 1 m` for all tokens, or for `ids`, rounded as stored.

        Without an offset, which takes up the center, it is `f(U)`.
        """
        codes = f"{prefix}codes"
        if self.format is None:
            features = self.activation(self._read(codes, dtype, ids))
            if not self.centered:
                return features
            center = self._read(f"{prefix}center", dtype)
            return ops.subtract(features, center)
        scales = getattr(self, f"{prefix}scales")
        if not self.format.has_row_scales:
            # Without the axis of rows, which a single id has none of.
            scales = ops.reshape(scales, (-1,))
        elif ids is not None:
            scales = ops.take(scales, ids, axis=0)
        features = self.format.round(
            self.activation(self._read(codes, "float32", ids)),
            ops.convert_to_tensor(getattr(self, f"{prefix}center")),
            ops.convert_to_tensor(scales),
            centered=self.use_bias,
        )
        return ops.cast(features, dtype)

    def _read(self, name: str, dtype: str, ids: Any = None) -> Any:
        """The factor `name` in `dtype`, or its rows `ids`."""
        value = getattr(self, name)
        if ids is not None:
            # Rows first: only they are cast, not the whole variable.
            value = ops.take(value, ids, axis=0)
        value = ops.cast(value, dtype)
        if name == "codes" and self.lora_enabled:
            value = self._add_lora(value, dtype, ids)
        return value

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        # Keras does not tell this method about `reverse`; the dtype does. For
        # ids that are floats, `call` sets the mask.
        if not keras.backend.is_int_dtype(inputs.dtype):
            return mask
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
            # Keras's models pass tensors and arrays here, too.
            ragged=getattr(inputs, "ragged", False),
            ragged_rank=getattr(inputs, "ragged_rank", None),
        )

    def _output_dtype(self, reverse: bool) -> str:
        if reverse and self.reverse_dtype is not None:
            return self.reverse_dtype
        return self.compute_dtype

    def _check_inputs(self, inputs: Any, reverse: bool) -> None:
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        is_float = keras.backend.is_float_dtype(dtype)
        if not reverse:
            if not (is_float or keras.backend.is_int_dtype(dtype)):
                raise TypeError(
                    "`inputs` must be integer indices. "
                    f"Received: inputs of dtype {dtype}"
                )
            if is_float and self.input_dim > _EXACT_BELOW.get(dtype, 2**53):
                warnings.warn(
                    f"Ids are given as {dtype}, which does not hold all whole "
                    f"numbers below input_dim={self.input_dim}: use "
                    '`keras.Input(shape, dtype="int32")`.',
                    stacklevel=2,
                )
            return
        if not is_float:
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
        return self._rows(self.variable_dtype, ids, prefix)

    def __dir__(self) -> list[str]:
        # Saving and loading read every attribute that `dir` lists, and these
        # would each time compute a table that can be larger than the model.
        hidden = ("embeddings", "reverse_embeddings")
        return [name for name in super().__dir__() if name not in hidden]

    @property
    def compression_ratio(self) -> float:
        """Bytes of the float32 table over those of the factors as stored."""
        stored = factor_bytes(
            self.rank,
            self.input_dim,
            self.output_dim,
            self.format,
            self.use_bias,
        )
        return 4 * self.input_dim * self.output_dim / stored

    # Construction

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "rank": self.rank,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
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
            "quantization": self.quantization,
            "row_scales": self.row_scales,
            "centered": self.centered,
            "lora_rank": self.lora_rank,
            "lora_alpha": self.lora_alpha,
        }

    @classmethod
    def from_embedding(
        cls,
        embedding: Any,
        rank: int | None = None,
        compression: float | None = None,
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
            rank: Integer, the rank. Give this or `compression`.
            compression: Float, how many times fewer bytes the factors take as
                they are stored than the table in float32, at least. The
                largest such rank is taken.
            **kwargs: Options of `factorize` (`method`, `row_weights`,
                `column_weights`, `seed`, `verbose`) and arguments of this
                layer, `activation`, `use_bias`, `quantization` and
                `row_scales` among them.
                A layer hands down its name, dtype policy (the float one, if
                quantized), `trainable`, `mask_zero`, `tie_weights`,
                `reverse_dtype`, `logit_soft_cap` and regularizers, unless
                given here. It does not hand down its initializer and
                constraint, which are for rows of the table.

        Returns:
            A built layer with the factors assigned.

        Raises:
            TypeError: If `embedding` is a layer without `embeddings`.
            ValueError: If the layer is not built, the table is not of rank 2
                or not finite, if not exactly one of `rank` and `compression`
                is given, or if the table would not get smaller.

        Example:

        ```python
        embedding = keras.layers.ReversibleEmbedding(1000, 64)
        embedding.build()
        layer = DistilledEmbedding.from_embedding(embedding, compression=4.0)
        layer.compression_ratio  # 4.28
        ```
        """
        return factorized_layer(cls, embedding, rank, compression, **kwargs)


def _check_float_dtype(name: str, value: Any) -> str:
    dtype = keras.backend.standardize_dtype(value)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(
            f"`{name}` must be a floating-point dtype. "
            f"Received: {name}={value!r}"
        )
    return dtype
