"""LoRA for a layer that stores factors."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distilled_embedding._utils.arguments import as_integer

# To a type checker the layer that the class is mixed into: Keras has no hints.
_Base: Any = object


class LoraCodes(_Base):
    """Mixin: trains a change of low rank to the codes, with all else frozen.

    The contract is that of `keras.layers.ReversibleEmbedding`. The layer
    provides `_saved_names()` and reads its codes through `_read`; mix this
    class in before `keras.layers.Layer`, whose saving it overrides.
    """

    lora_enabled: bool
    lora_rank: Any
    lora_alpha: Any

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
        rank = as_integer("rank", rank)
        if self.embeddings_constraint is not None:
            raise ValueError(
                "LoRA is incompatible with embedding constraints. Remove the "
                "`embeddings_constraint` argument. Received: "
                f"embeddings_constraint={self.embeddings_constraint}"
            )
        if not self.built:
            raise ValueError(
                "Cannot enable LoRA on a layer that is not built. Call "
                f"`build()` first. Received: layer '{self.name}'"
            )
        if self.lora_enabled:
            raise ValueError(
                "This can be done once per layer, and lora is already enabled. "
                f"Received: layer '{self.name}'"
            )
        self._tracker.unlock()
        for name, shape, initializer in (
            ("lora_codes_a", (self.input_dim, rank), a_initializer),
            ("lora_codes_b", (rank, self.rank), b_initializer),
        ):
            variable = self.add_weight(
                name=name,
                shape=shape,
                initializer=initializer,
                # Whatever the policy: small updates vanish in half precision.
                dtype="float32",
                regularizer=self.embeddings_regularizer,
                autocast=False,
            )
            setattr(self, name, variable)
        self._tracker.lock()
        for name in self._saved_names():
            if not name.startswith("reverse_"):
                getattr(self, name).trainable = False
        self.lora_enabled = True
        self.lora_rank = rank
        self.lora_alpha = lora_alpha if lora_alpha is not None else rank

    def _add_lora(self, codes: Any, dtype: str, ids: Any) -> Any:
        """The codes, or the rows `ids` of them, with the trained change."""
        a = self.lora_codes_a
        if ids is not None:
            a = ops.take(a, ids, axis=0)
        change = ops.matmul(
            ops.cast(a, dtype), ops.cast(self.lora_codes_b, dtype)
        )
        # A difference, which Keras on TensorFlow takes for nothing else: see
        # `Format.round`.
        scale = self.lora_alpha / self.lora_rank
        return ops.subtract(codes, ops.multiply(-scale, change))

    def save_own_variables(self, store: Any) -> None:
        """Saves the factors in a fixed order, LoRA merged into the codes."""
        if not self.built:
            return
        for index, name in enumerate(self._saved_names()):
            value = getattr(self, name)
            if name == "codes" and self.lora_enabled:
                value = self._read(name, self.variable_dtype)
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
