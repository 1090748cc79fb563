"""Writing a language model as a bundle that the LiteRT-LM runtime runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding._utils.files import check_destination
from keras_distilled_embedding._utils.files import write_atomically
from keras_distilled_embedding._utils.packages import require_package
from keras_distilled_embedding.export import causal_lm
from keras_distilled_embedding.export import tokenizers
from keras_distilled_embedding.export.litert import check_environment
from keras_distilled_embedding.export.litert import export_litert
from keras_distilled_embedding.export.report import ExportReport
from keras_distilled_embedding.export.report import Fidelity
from keras_distilled_embedding_runner import BUNDLE_SETTINGS

PREFILL_LENGTHS = (8, 32, 128)
# Beside those of every export, and the extras that bring them.
PACKAGES = {"keras_hub": "hub", "litert_lm_builder": "litertlm"}
# Tokens that are compared with Keras, where no prompts are given.
_RANDOM_TOKENS = 16


def export_litertlm(
    task: Any,
    filepath: str | os.PathLike,
    *,
    max_length: int,
    prefill_lengths: Sequence[int] = PREFILL_LENGTHS,
    quantization: str | None = None,
    prompt_template: str | None = None,
    prompts: Sequence[str] | None = None,
    verbose: bool = True,
) -> ExportReport:
    """Exports a KerasHub language model as a `.litertlm` bundle.

    The bundle holds all that the LiteRT-LM runtime needs to write text: the
    model with one copy of each table, once to read a prompt and once to add a
    token, keys and values of earlier tokens kept between calls; the
    tokenizer; start and stop tokens. It is written whole or not at all.

    The runtime reads a prompt in pieces of `prefill_lengths`, and its last
    token alone. It samples greedily unless told otherwise.

    Args:
        task: A `keras_hub.models.CausalLM` with a preprocessor, compressed or
            not, that computes in float32. It is not changed.
        filepath: The file to write, by convention `*.litertlm`. An existing
            file is replaced once the new one is complete.
        max_length: Integer, tokens of prompt and answer together, at most.
            Keys and values take memory for so many on the device.
        prefill_lengths: Integers, numbers of tokens of a prompt that are read
            at once. A small one is for short prompts and last pieces; of the
            default, those above `max_length` are left out.
        quantization: As of `export_litert`.
        prompt_template: A Jinja template which makes a prompt of a
            conversation, for models trained on conversations. By default the
            runtime is given the text as it is.
        prompts: Texts on which the bundle is compared with the Keras model,
            token by token; by default random tokens.
        verbose: Whether to print the report.

    Returns:
        An `ExportReport`. Its fidelity is that of the logits of `decode`.

    Raises:
        TypeError: If `task` is not a `CausalLM`.
        ValueError: If `task` has no tokenizer that the runtime knows, or
            caches that it cannot keep, or predicts something else with its
            caches than without; if a length is not a positive integer,
            more than `max_length`, or `max_length` more than the model takes;
            and as of `export_litert`.
        OSError: If the file cannot be written.
        ImportError: If KerasHub or a package of LiteRT is missing.
        RuntimeError: As of `export_litert`.

    Example:

    ```
    task = keras_hub.models.CausalLM.from_preset("gpt2_base_en")
    student = compress(task, compression=8.0, calibration_data=paragraphs)
    export_litertlm(student, "student.litertlm", max_length=512)
    ```

    References:
    - [LiteRT-LM](https://github.com/google-ai-edge/LiteRT-LM)
    """
    check_environment(quantization)
    for package, extra in PACKAGES.items():
        require_package(package, extra, "Export of a language model")
    _check_task(task)
    max_length = causal_lm.check_length(task, "max_length", max_length)
    lengths = _check_lengths(prefill_lengths, max_length)
    filepath = Path(filepath)
    check_destination("filepath", filepath)
    tokenizer = task.preprocessor.tokenizer
    vocabulary = tokenizers.stored_vocabulary(tokenizer)
    settings = _settings(task.preprocessor, max_length)

    # The lookup tables of a tokenizer cannot be converted.
    bare = type(task)(backbone=task.backbone, preprocessor=None)
    form, models = causal_lm.step_models(bare, max_length, lengths)
    texts = _token_ids(task, prompts, max_length)
    with tempfile.TemporaryDirectory(
        prefix=f".{filepath.name}.", dir=filepath.parent
    ) as folder:
        model_file = Path(folder, "model.tflite")
        report = export_litert(
            bare,
            model_file,
            quantization=quantization,
            signatures=models,
            fidelity_inputs={},  # below, by steps that follow each other
            verbose=False,
        )
        fidelity = compare_steps(model_file, bare, form, texts)
        builder = _bundle(
            model_file,
            vocabulary,
            settings,
            _metadata(settings, prompt_template),
            _state_buffers(form),
            Path(folder),
        )
        write_atomically(filepath, builder.build)
    report = dataclasses.replace(
        report,
        filepath=str(filepath),
        bytes=filepath.stat().st_size,
        fidelity=fidelity,
    )
    if verbose:
        print(report)
    return report


# What is checked before any work


def _check_task(task: Any) -> None:
    import keras_hub

    if not isinstance(task, keras_hub.models.CausalLM):
        raise TypeError(
            "`task` must be a `keras_hub.models.CausalLM`; other models are "
            f"for `export_litert`. Received: task={task!r}"
        )
    causal_lm.check_task(task, "call_with_cache")


def _check_lengths(lengths: Sequence[int], max_length: int) -> list[int]:
    if not isinstance(lengths, list | tuple) or not lengths:
        raise ValueError(
            "`prefill_lengths` must be a list of positive integers. "
            f"Received: prefill_lengths={lengths!r}"
        )
    found = sorted({as_integer("prefill_lengths", n) for n in lengths})
    if tuple(lengths) == PREFILL_LENGTHS:
        found = [n for n in found if n <= max_length] or [1]
    if found[-1] > max_length:
        raise ValueError(
            f"`prefill_lengths` must be at most max_length={max_length}. "
            f"Received: prefill_lengths={lengths!r}"
        )
    return found


def _token_ids(
    task: Any, prompts: Sequence[str] | None, max_length: int
) -> list[np.ndarray]:
    """Texts as the model reads them, each `(1, n)`."""
    if prompts is None:
        rng = np.random.default_rng(0)
        size = (1, min(_RANDOM_TOKENS, max_length))
        vocabulary = task.output.shape[-1]
        return [rng.integers(vocabulary, size=size, dtype="int32")]
    if isinstance(prompts, str) or not all(
        isinstance(prompt, str) for prompt in prompts
    ):
        raise ValueError(
            f"`prompts` must be a list of texts. Received: prompts={prompts!r}"
        )
    found = []
    for prompt in prompts:
        read = task.preprocessor.generate_preprocess(
            [prompt], sequence_length=max_length
        )
        ids = tokenizers.ids_without_padding(read)
        found.append(np.array([ids], "int32"))
    return found


# What the bundle holds beside the model


def _settings(preprocessor: Any, max_length: int) -> dict[str, Any]:
    """Ids that start and stop a text, and its length."""
    # KerasHub generates with a start token even where it trains without one.
    empty = preprocessor.generate_preprocess([""], sequence_length=max_length)
    return {
        "start_ids": tokenizers.ids_without_padding(empty),
        "stop_ids": tokenizers.stop_tokens(preprocessor.tokenizer),
        "max_length": max_length,
    }


def _metadata(settings: dict[str, Any], template: str | None) -> Any:
    """The same, and how the runtime samples."""
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    found = llm_metadata_pb2.LlmMetadata(
        max_num_tokens=settings["max_length"],
        supports_thinking=False,
        supports_function_calling=False,
    )
    if settings["start_ids"]:
        found.start_token.token_ids.ids.extend(settings["start_ids"])
    for stop in settings["stop_ids"]:
        found.stop_tokens.add().token_ids.ids.append(stop)
    # Greedy: of the runtime's samplers, on processors it has this one alone.
    sampler = found.sampler_params
    sampler.type = sampler.TOP_P
    sampler.k, sampler.p, sampler.temperature = 1, 1.0, 1.0
    found.llm_model_type.generic_model.SetInParent()
    if template is not None:
        found.jinja_prompt_template = template
    return found


def _state_buffers(form: causal_lm.CacheForm) -> Any:
    """Which inputs are the outputs of the step before, and of what kind."""
    from litert_lm_builder.runtime.proto import executor_metadata_pb2

    kinds = executor_metadata_pb2.StateBuffer
    found = executor_metadata_pb2.ExecutorMetadata()
    for keys, values in form.names:
        for name, kind in (
            (keys, kinds.TYPE_GLOBAL_KEY_CACHE),
            (values, kinds.TYPE_GLOBAL_VALUE_CACHE),
        ):
            found.llm_executor_metadata.state_buffers.add(
                prefill_input_name=name,
                prefill_output_name=name,
                decode_input_name=name,
                decode_output_name=name,
                type=kind,
                sequence_axis=1,
            )
    return found


def _bundle(
    model_file: Path,
    vocabulary: tokenizers.StoredVocabulary,
    settings: dict[str, Any],
    metadata: Any,
    state_buffers: Any,
    folder: Path,
) -> Any:
    """The builder of a bundle; it reads the files when it writes."""
    from litert_lm_builder import litertlm_builder

    def written(name: str, content: bytes) -> str:
        path = folder / name
        path.write_bytes(content)
        return str(path)

    builder = litertlm_builder.LitertLmFileBuilder()
    digest = hashlib.sha256(model_file.read_bytes()).hexdigest()
    for key, value in (
        ("Authors", "keras-distilled-embedding"),
        # What the runtime has no use for, but the runner.
        (BUNDLE_SETTINGS, json.dumps(settings | {"sha256": digest})),
    ):
        builder.add_system_metadata(
            litertlm_builder.Metadata(
                key=key, value=value, dtype=litertlm_builder.DType.STRING
            )
        )
    builder.add_llm_metadata(written("llm.pb", metadata.SerializeToString()))
    builder.add_executor_metadata(
        written("executor.pb", state_buffers.SerializeToString())
    )
    if vocabulary.is_sentencepiece:
        path = written("tokenizer.spm", vocabulary.content)
        builder.add_sentencepiece_tokenizer(path)
    else:
        path = written("tokenizer.json", vocabulary.content)
        builder.add_hf_tokenizer(path)
    builder.add_tflite_model(
        str(model_file),
        litertlm_builder.TfLiteModelType.PREFILL_DECODE,
        backend_constraint="cpu",
    )
    return builder


# How far the file is from Keras


def compare_steps(
    model_file: Path,
    task: Any,
    form: causal_lm.CacheForm,
    texts: Iterable[np.ndarray],
) -> Fidelity:
    """Reads texts token by token, and compares with the task as a whole.

    Args:
        model_file: With the signatures of `causal_lm.step_models`.
        task: The task, which reads each text at once and without caches.
        form: Of its caches.
        texts: Arrays `(1, n)` of token ids.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(model_file))
    decode = interpreter.get_signature_runner(causal_lm.DECODE)
    error = energy = same = divergence = 0.0
    positions = count = 0
    for ids in texts:
        count += 1
        wanted = causal_lm.logits_of_whole(task, ids).astype("float64")
        state = causal_lm.empty_caches(form)
        for position, expected in enumerate(wanted):
            state = decode(
                **{
                    causal_lm.TOKENS: ids[:, position : position + 1],
                    causal_lm.POSITIONS: np.array([position], "int32"),
                },
                **state,
            )
            found = state.pop(causal_lm.LOGITS)[0, 0].astype("float64")
            error += np.square(found - expected).sum()
            energy += np.square(expected).sum()
            same += found.argmax() == expected.argmax()
            divergence += _divergence(expected, found)
            positions += 1
    return Fidelity(
        relative_rms_error=float(np.sqrt(error / energy)) if energy else 0.0,
        top1_agreement=float(same / positions),
        num_inputs=count,
        divergence=float(divergence / positions),
    )


def _divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Kullback-Leibler, in nats, of what two rows of logits predict."""
    log_p, log_q = (
        row - row.max() - np.log(np.exp(row - row.max()).sum())
        for row in (expected, found)
    )
    return float((np.exp(log_p) * (log_p - log_q)).sum())
