"""Int8 quantization and LoRA for a layer that stores factors.

`DistilledEmbedding` reads every variable through `_read`, so its equations
are written once and hold for float, quantized and LoRA-adapted factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
from keras import ops


class FactorQuantization:
    """Mixin: how the factors are stored, read, saved and loaded.

    The layer provides `_factor_shapes()`, the shape of every factor by name,
    and mixes this class in before `keras.layers.Layer`, whose methods it
    overrides.

    A quantized matrix is an int8 variable under its old name and a float
    variable `<name>_scale`, of which the matrix is `int8 / scale`. Codes have
    one scale a row (a token), the other matrices one an output channel.
    """

    def _read(self, name: str, dtype: str, ids: Any = None) -> Any:
        """The effective matrix `name` in `dtype`, or its rows `ids`."""

        def cast(variable: Any) -> Any:
            # Rows first: only they are cast, not the whole variable.
            if ids is not None:
                variable = ops.take(variable, ids, axis=0)
            return ops.cast(variable, dtype)

        value = cast(getattr(self, name))
        scale = getattr(self, f"{name}_scale", None)
        if scale is not None:
            # Codes have one scale a row, the others share one row of scales.
            scale = cast(scale) if _is_codes(name) else ops.cast(scale, dtype)
            value = ops.divide(value, scale)
        if name == "codes" and self.lora_enabled:
            delta = ops.matmul(
                cast(self.lora_codes_a), ops.cast(self.lora_codes_b, dtype)
            )
            value = ops.add(value, (self.lora_alpha / self.lora_rank) * delta)
        return value

    # Quantization

    def quantize(
        self,
        mode: str | None = None,
        type_check: bool = True,
        config: Any = None,
    ) -> None:
        """Quantizes the factors to int8, in place.

        Weights only: they are read back as floats, so the logits see the
        rounding of the weights and none of the hidden states.
        `model.quantize("int8")` calls this.

        Args:
            mode: `"int8"`.
            type_check: Part of Keras's signature. Keras refuses subclasses
                with it; here they are quantized like the layer itself, since
                quantized factors go through the same `call`.
            config: Optional `keras.quantizers.Int8QuantizationConfig`. Its
                activation quantizer has nothing to act on.

        Raises:
            NotImplementedError: For any mode other than `"int8"`.
            ValueError: If the layer is not built, is already quantized, or
                the config has a weight quantizer: the factors need one axis
                each.
        """
        if mode != "int8":
            raise self._quantization_mode_error(mode)
        if config is not None and config.weight_quantizer is not None:
            raise ValueError(
                "The factors are quantized along one axis each, which a single "
                "weight quantizer cannot express; leave `weight_quantizer` "
                "unset. Received: config.weight_quantizer="
                f"{config.weight_quantizer}"
            )
        values = {}
        for name in self._factor_shapes():
            values.update(_to_int8(name, getattr(self, name)))
            delattr(self, name)
        self.quantized_build(None, mode, config)
        for name, value in values.items():
            getattr(self, name).assign(value)
        if self.dtype_policy.quantization_mode is None:
            self.dtype_policy = keras.dtype_policies.get(
                f"{mode}_from_{self.dtype_policy.name}"
            )

    def quantized_build(
        self, input_shape: Any, mode: str, config: Any = None
    ) -> None:
        """Adds the variables of a quantized layer."""
        if mode != "int8":
            raise self._quantization_mode_error(mode)
        for name, shape in self._factor_shapes().items():
            if len(shape) == 1:
                # Biases are small and stay floats, as in keras.layers.Dense.
                variable = self.add_weight(
                    name=name, shape=shape, initializer="zeros", autocast=False
                )
            else:
                variable = self.add_weight(
                    name=name,
                    shape=shape,
                    initializer="zeros",
                    dtype="int8",
                    trainable=False,
                )
                scale = self.add_weight(
                    name=f"{name}_scale",
                    shape=(shape[0], 1) if _is_codes(name) else (1, shape[1]),
                    initializer="ones",
                    trainable=False,
                    autocast=False,
                )
                setattr(self, f"{name}_scale", scale)
            setattr(self, name, variable)
        self._is_quantized = True

    def _int8_call(self, inputs: Any, reverse: bool = False) -> Any:
        return self.call(inputs, reverse=reverse)

    def _quantization_mode_error(self, mode: str | None) -> Exception:
        return NotImplementedError(
            f"Layer {self.__class__.__name__} can be quantized to 'int8' only. "
            f"Received: mode={mode!r}"
        )

    # LoRA

    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        a_initializer: Any = "he_uniform",
        b_initializer: Any = "zeros",
    ) -> None:
        """Freezes the factors and adapts the codes by a trained low rank.

        The codes become `codes + lora_alpha / rank * a @ b`, inside the
        activation. Saving stores the sum, under the name of the codes. As in
        `keras.layers.ReversibleEmbedding`, the output projection of an untied
        layer is neither adapted nor frozen.

        Args:
            rank: Integer, the rank of the change.
            lora_alpha: Optional float, defaults to `rank`.
            a_initializer: Initializer of `lora_codes_a`, `(input_dim, rank)`.
            b_initializer: Initializer of `lora_codes_b`, `(rank, layer.rank)`.

        Raises:
            ValueError: If the layer is not built, has LoRA already, or
                constrains its codes; or if `rank` is less than 1.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(
                f"`rank` must be a positive integer. Received: rank={rank!r}"
            )
        if self.embeddings_constraint is not None:
            raise ValueError(
                "LoRA is incompatible with a constraint on the codes. Remove "
                "the `embeddings_constraint` argument. Received: "
                f"embeddings_constraint={self.embeddings_constraint}"
            )
        if not self.built:
            raise ValueError(
                "Cannot enable LoRA on a layer that is not built. Call "
                f"`build()` first. Received: layer '{self.name}'"
            )
        if self.lora_enabled:
            raise ValueError(
                "LoRA is enabled already; this can be done once per layer. "
                f"Received: layer '{self.name}'"
            )
        self._tracker.unlock()
        # float32 whatever the policy: small updates vanish in half precision.
        self.lora_codes_a = self.add_weight(
            name="lora_codes_a",
            shape=(self.input_dim, rank),
            initializer=a_initializer,
            dtype="float32",
            regularizer=self.embeddings_regularizer,
            autocast=False,
        )
        self.lora_codes_b = self.add_weight(
            name="lora_codes_b",
            shape=(rank, self.rank),
            initializer=b_initializer,
            dtype="float32",
            regularizer=self.embeddings_regularizer,
            autocast=False,
        )
        self._tracker.lock()
        for name in self._factor_shapes():
            if not name.startswith("reverse_"):
                getattr(self, name).trainable = False
        self.lora_enabled = True
        self.lora_rank = rank
        self.lora_alpha = lora_alpha if lora_alpha is not None else rank

    # Saving

    def save_own_variables(self, store: Any) -> None:
        """Saves the factors in a fixed order, LoRA merged into the codes."""
        if not self.built:
            return
        merged = {}
        if self.lora_enabled:
            merged["codes"] = self._read("codes", self.variable_dtype)
            if self.quantization_mode is not None:
                merged = _to_int8("codes", merged["codes"])
        for index, name in enumerate(self._saved_names()):
            value = merged[name] if name in merged else getattr(self, name)
            store[str(index)] = value

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` stored; resets LoRA to no change."""
        if not self.lora_enabled:
            self._check_load_own_variables(store)
        if not self.built:
            return
        for index, name in enumerate(self._saved_names()):
            getattr(self, name).assign(store[str(index)])
        if self.lora_enabled:
            # One zero factor is enough, and the other keeps a gradient.
            self.lora_codes_b.assign(ops.zeros(self.lora_codes_b.shape))

    def _saved_names(self) -> Iterator[str]:
        for name in self._factor_shapes():
            yield name
            if hasattr(self, f"{name}_scale"):
                yield f"{name}_scale"


def _is_codes(name: str) -> bool:
    return name.endswith("codes")


def _to_int8(name: str, value: Any) -> dict[str, Any]:
    """The stored form of a float factor: int8 and its scale, by name."""
    if len(value.shape) == 1:
        return {name: ops.convert_to_tensor(value)}
    values, scale = keras.quantizers.abs_max_quantize(
        value, axis=-1 if _is_codes(name) else 0
    )
    return {name: values, f"{name}_scale": scale}
