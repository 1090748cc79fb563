"""Writing a sequence-to-sequence model as a file that translates."""

from __future__ import annotations

import dataclasses
import inspect
import os
import tempfile
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_distilled_embedding._utils.files import check_destination
from keras_distilled_embedding._utils.packages import require_package
from keras_distilled_embedding.export import causal_lm
from keras_distilled_embedding.export import tokenizers
from keras_distilled_embedding.export.litert import check_environment
from keras_distilled_embedding.export.litert import export_litert
from keras_distilled_embedding.export.report import ExportReport

SOURCE, TOKEN, POSITION, MASK = "source", "token", "position", "source_mask"
# What decodes, and what it must take.
_METHOD = "call_decoder_with_cache"
_ARGUMENTS = {
    "encoder_hidden_states",
    "encoder_padding_mask",
    "decoder_token_ids",
    "self_attention_cache",
    "self_attention_cache_update_index",
    "cross_attention_cache",
    "cross_attention_cache_update_index",
}


def export_litert_seq2seq(
    task: Any,
    filepath: str | os.PathLike,
    *,
    max_length: int,
    source_length: int | None = None,
    quantization: str | None = None,
    verbose: bool = True,
) -> ExportReport:
    """Exports a KerasHub sequence-to-sequence model as a file that translates.

    The LiteRT file holds all that `keras_distilled_embedding_runner.py` and
    `keras-distilled-embedding generate` need: the model with one copy of each
    table, its tokenizer and the tokens that start and end a text. Of its two
    signatures, `encode` reads the source once, and `decode` adds a token to
    the target, keys and values of earlier tokens kept between calls. All sizes
    are fixed, for one text at a time, so that it runs in a browser, too. It is
    written whole or not at all.

    Args:
        task: A `keras_hub.models.Seq2SeqLM` such as BART and T5, with a
            preprocessor, compressed or not, that computes in float32. It is
            not changed.
        filepath: The file to write. An existing file is replaced once the new
            one is complete.
        max_length: Integer, tokens of the target, at most.
        source_length: Integer, tokens of the source, at most; by default
            `max_length`. Shorter ones are padded to it.
        quantization: As of `export_litert`.
        verbose: Whether to print the report.

    Returns:
        An `ExportReport`.

    Raises:
        TypeError: If `task` is not a `Seq2SeqLM`.
        ValueError: If `task` decodes in another way than BART and T5, or has
            no tokenizer that can be stored; if a length is not an integer of
            at least 2, or more than the model takes; and as of
            `export_litert`.
        OSError: If the file cannot be written.
        ImportError: If KerasHub or a package of LiteRT is missing.
        RuntimeError: As of `export_litert`.

    Example:

    ```
    task = keras_hub.models.Seq2SeqLM.from_preset("t5_small_multi")
    student = compress(task, compression=8.0)
    export_litert_seq2seq(student, "student.tflite", max_length=64)
    ```
    """
    check_environment(quantization)
    require_package("keras_hub", "hub", "Export of a translator")
    _check_task(task)
    max_length = causal_lm.check_length(task, "max_length", max_length)
    source_length = causal_lm.check_length(
        task,
        "source_length",
        max_length if source_length is None else source_length,
    )
    filepath = Path(filepath)
    check_destination("filepath", filepath)
    vocabulary = tokenizers.stored_vocabulary(task.preprocessor.tokenizer)
    settings = _settings(task.preprocessor, max_length)

    # The lookup tables of a tokenizer cannot be converted.
    bare = type(task)(backbone=task.backbone, preprocessor=None)
    models = step_models(bare, max_length, source_length, settings["pad_id"])
    with tempfile.TemporaryDirectory(
        prefix=f".{filepath.name}.", dir=filepath.parent
    ) as folder:
        model_file = Path(folder, "model.tflite")
        report = export_litert(
            bare,
            model_file,
            quantization=quantization,
            signatures=models,
            verbose=False,
        )
        tokenizers.append_tokenizer(model_file, filepath, vocabulary, settings)
    report = dataclasses.replace(
        report, filepath=str(filepath), bytes=filepath.stat().st_size
    )
    if verbose:
        print(report)
    return report


def _check_task(task: Any) -> None:
    import keras_hub

    if not isinstance(task, keras_hub.models.Seq2SeqLM):
        raise TypeError(
            "`task` must be a `keras_hub.models.Seq2SeqLM`; language models "
            "are for `export_litertlm`, others for `export_litert`. "
            f"Received: task={task!r}"
        )
    method = getattr(task, _METHOD, None)
    arguments = list(inspect.signature(method).parameters) if method else []
    if not _ARGUMENTS.issubset(arguments):
        raise ValueError(
            "`task` must read a text, and keep keys and values, as BART and "
            f"T5 do. Received: {type(task).__name__} with a `{_METHOD}` of "
            f"{arguments}"
        )
    causal_lm.check_task(task, _METHOD)


def _settings(preprocessor: Any, max_length: int) -> dict[str, Any]:
    """What stands around the tokens of a text, as ids."""
    tokenizer = preprocessor.tokenizer
    empty = preprocessor.generate_preprocess([""])

    start = tokenizers.ids_without_padding(empty, "decoder_")
    return {
        "pad_id": int(tokenizer.pad_token_id),
        "bos_id": start[-1],
        "eos_id": int(tokenizer.end_token_id),
        "max_length": max_length,
        "start_ids": start,
        "stop_ids": tokenizers.stop_tokens(tokenizer),
        "source_start_ids": tokenizers.ids_without_padding(empty, "encoder_")[
            :-1
        ],
    }


# The signatures


def step_models(
    task: Any, max_length: int, source_length: int, pad_id: int
) -> dict[str, keras.Model]:
    """The two parts of a task that a search for a translation calls.

    `encode` maps `source (1, source_length)` int32, padded, to what every step
    needs of it: the keys and values `cross_key_i` and `cross_value_i` of each
    decoder layer `i`, and `source_mask`.

    `decode` reads a `token (1, 1)` int32, its `position (1,)` int32, all that
    `encode` returned, and the caches `self_key_i` and `self_value_i`, `(1,
    max_length, heads, size)`, which start as zeros. It returns these with the
    token in them, and the `logits (1, V)` of the next.

    Raises:
        ValueError: If the task does not generate from token ids alone.
    """
    arguments = causal_lm.first_call(
        task,
        _METHOD,
        {
            "encoder_token_ids": ops.ones((1, source_length), "int32"),
            "encoder_padding_mask": ops.ones((1, source_length), "bool"),
            "decoder_token_ids": ops.ones((1, max_length), "int32"),
            "decoder_padding_mask": ops.ones((1, max_length), "bool"),
        },
    )
    cache = arguments["self_attention_cache"]
    _, num_layers, _, *shape = cache.shape
    form = causal_lm.CacheForm(False, num_layers, (1, *shape))
    step = TranslationStep(task, form, source_length, pad_id, name="step")
    source = keras.Input(
        batch_shape=(1, source_length), dtype="int32", name=SOURCE
    )
    encode = keras.Model({SOURCE: source}, step({SOURCE: source}))
    inputs = {
        name: keras.Input(batch_shape=tensor.shape, name=name)
        for name, tensor in (encode.output | step.caches()).items()
    }
    for name, size in ((TOKEN, (1, 1)), (POSITION, (1,))):
        inputs[name] = keras.Input(batch_shape=size, dtype="int32", name=name)
    return {"encode": encode, "decode": keras.Model(inputs, step(inputs))}


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class TranslationStep(causal_lm.CachedStep):
    """`call_encoder` or `call_decoder_with_cache` of a task, by its inputs.

    Args:
        task: The task.
        form: Of the keys and values of the target.
        source_length: Tokens of the source.
        pad_id: What the source is padded with.
    """

    def __init__(
        self,
        task: Any,
        form: Any,
        source_length: int,
        pad_id: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(task, form, **kwargs)
        self.source_length = source_length
        self.pad_id = pad_id
        self._own = self.form.names_like("self_key", "self_value")
        self._cross = self.form.names_like("cross_key", "cross_value")

    def call(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return (
            self._encode(inputs[SOURCE])
            if SOURCE in inputs
            else self._decode(inputs)
        )

    def _encode(self, source: Any) -> dict[str, Any]:
        mask = ops.not_equal(source, self.pad_id)
        hidden = self.task.call_encoder(token_ids=source, padding_mask=mask)
        # Keys and values come of a first step, whose own result is not used.
        zeros = {
            name: ops.zeros(tensor.shape)
            for name, tensor in (self.caches() | self._known()).items()
        }
        *_, cross = self._call_decoder(
            zeros, ops.zeros((1, 1), "int32"), 0, hidden, mask, 0
        )
        found = {MASK: ops.cast(mask, "float32")}
        return found | causal_lm.by_name(cross, self._cross)

    def _decode(self, inputs: dict[str, Any]) -> dict[str, Any]:
        width = self.task.backbone.hidden_dim
        logits, _, own, _ = self._call_decoder(
            inputs,
            inputs[TOKEN],
            inputs[POSITION][0],
            ops.zeros((1, self.source_length, width)),  # known already
            ops.cast(inputs[MASK], "bool"),
            None,
        )
        caches = causal_lm.by_name(own, self._own)
        return {causal_lm.LOGITS: logits[:, 0]} | caches

    def _call_decoder(
        self,
        tensors: dict[str, Any],
        token: Any,
        position: Any,
        hidden: Any,
        mask: Any,
        cross_index: int | None,
    ) -> Any:
        return self.task.call_decoder_with_cache(
            encoder_hidden_states=hidden,
            encoder_padding_mask=mask,
            decoder_token_ids=token,
            self_attention_cache=causal_lm.joined(tensors, self._own),
            self_attention_cache_update_index=position,
            cross_attention_cache=causal_lm.joined(tensors, self._cross),
            cross_attention_cache_update_index=cross_index,
        )

    def caches(self) -> dict[str, keras.KerasTensor]:
        """Those of the target."""
        return self._tensors(self._own, self.form.shape)

    def _known(self) -> dict[str, keras.KerasTensor]:
        """What a step knows of the source."""
        _, _, heads, size = self.form.shape
        shape = (1, self.source_length, heads, size)
        mask = keras.KerasTensor((1, self.source_length), "float32")
        return {MASK: mask} | self._tensors(self._cross, shape)

    def _tensors(
        self, names: list[tuple[str, str]], shape: tuple[int, ...]
    ) -> dict[str, keras.KerasTensor]:
        return {
            name: keras.KerasTensor(shape, "float32")
            for pair in names
            for name in pair
        }

    def compute_output_spec(
        self, inputs: dict[str, Any]
    ) -> dict[str, keras.KerasTensor]:
        if SOURCE in inputs:
            return self._known()
        logits = keras.KerasTensor((1, self.task.output.shape[-1]), "float32")
        return {causal_lm.LOGITS: logits} | self.caches()

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "source_length": self.source_length,
            "pad_id": self.pad_id,
        }
