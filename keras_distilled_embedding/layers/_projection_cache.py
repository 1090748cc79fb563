"""Keeping what a funnel's projection computes for all tokens."""

from __future__ import annotations

from typing import Any

import keras


class ProjectionCache:
    """The part of `DistilledEmbedding` that trades memory for time.

    With `hidden_dim` every call of the projection computes
    `[f(U), g(U A + b)]` for the whole vocabulary first: `V r h`
    multiplications, which a batch of thousands of states hardly notices, but
    which greedy decoding pays for each token.
    """

    # Of plain objects, so that Keras neither tracks nor saves what is kept.
    _kept_features: _Kept | None = None

    def cache_projection(self) -> None:
        """Computes `[f(U), g(U A + b)]` once, for a frozen layer.

        Off by default, since it takes `V (r + h)` numbers: as much as a table
        of that width. Then a state costs `(r + h) (d + V)` multiplications,
        against `r (d + V)` of the plain form of rank `r` and `d V` of the
        table. It is dropped when the factors change: by `trainable = True`,
        `set_factors`, loading, `quantize` and `enable_lora`. Functions that
        are compiled already go on as they were compiled.

        Raises:
            ValueError: If the layer is not built, is trainable or quantized,
                or has no `hidden_dim`.

        Example:

        ```python
        layer = DistilledEmbedding(1000, 64, rank=8, hidden_dim=32)
        layer.build()
        layer.trainable = False
        layer.cache_projection()
        logits = layer(keras.random.normal((1, 64)), reverse=True)
        ```
        """
        if (
            not self.built
            or self.trainable
            or self.hidden_dim is None
            or self.quantization_mode is not None
        ):
            raise ValueError(
                "`cache_projection` is for a built, float layer with "
                "`hidden_dim` and `trainable = False`. Received: layer "
                f"'{self.name}' with built={self.built}, trainable="
                f"{self.trainable}, hidden_dim={self.hidden_dim}, "
                f"quantization_mode={self.quantization_mode}"
            )
        self.drop_projection_cache()
        prefix = "" if self.tie_weights else "reverse_"
        dtype = self._output_dtype(reverse=True)
        self._kept_features = _Kept(
            prefix, dtype, self._features(dtype, prefix=prefix)
        )

    def drop_projection_cache(self) -> None:
        """Computes the projection from the factors again."""
        self._kept_features = None

    @property
    def trainable(self) -> bool:
        return keras.layers.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        if value:
            self.drop_projection_cache()
        keras.layers.Layer.trainable.fset(self, value)

    def load_own_variables(self, store: Any) -> None:
        self.drop_projection_cache()
        super().load_own_variables(store)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        self.drop_projection_cache()
        super().quantize(*args, **kwargs)

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        self.drop_projection_cache()
        super().enable_lora(*args, **kwargs)

    def _projection_features(self, dtype: str, prefix: str) -> Any:
        kept = self._kept_features
        if kept is not None and (kept.prefix, kept.dtype) == (prefix, dtype):
            return kept.features
        return self._features(dtype, prefix=prefix)


class _Kept:
    """Features of all tokens, and which ones they are."""

    def __init__(self, prefix: str, dtype: str, features: Any) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.features = features
