"""KerasHub's architectures, built small from their configurations.

What the matrix of `test_kerashub.py` and the table in docs/ are made from:

    python -m tests.architectures  # prints the table
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from functools import cache
from typing import Any

import keras
import numpy as np

from tests.vocabularies import byte_pairs
from tests.vocabularies import paragraphs
from tests.vocabularies import sentence_pieces

VOCABULARY = 48
WIDTH = 16
LENGTH = 8
# Of models that write: bytes and special tokens are pieces, too.
PIECES = 300
TEXT_LENGTH = 24

_COMMON = dict(
    vocabulary_size=VOCABULARY,
    num_layers=1,
    hidden_dim=WIDTH,
    intermediate_dim=24,
)
_HEADS = dict(num_heads=2)
_POSITIONS = dict(max_sequence_length=LENGTH)
_GROUPED = dict(num_query_heads=2, num_key_value_heads=1)


@dataclass(frozen=True)
class Architecture:
    """One architecture, and the task that it is tested in.

    Args:
        name: As people call it.
        backbone: Class of `keras_hub.models`.
        task: Class of `keras_hub.models`; `None` tests the backbone alone.
        options: Arguments of the backbone.
        tables: What becomes of the tables, for the documentation.
        exports: How it becomes a LiteRT file: for sequences of any length, of
            one fixed length, or why not.
        refused: Why it goes into no file that writes texts, if it generates.
    """

    name: str
    backbone: str
    task: str | None
    options: dict[str, Any] = field(default_factory=dict)
    tables: str = "one, tied"
    exports: str = "any length"
    refused: str = ""

    @property
    def generates(self) -> bool:
        return self.task is not None and not self.task.endswith("MaskedLM")

    @property
    def translates(self) -> bool:
        return self.generates and "Seq2Seq" in self.task

    @property
    def writes(self) -> str:
        """In which file it writes texts, for the documentation."""
        if not self.generates:
            return ""
        if self.refused:
            return f"no: {self.refused}"
        own = "no, but [a file of its own](on-device.md#sequence-to-sequence)"
        return own if self.translates else "yes"

    def make(self, seed: int = 0, **changes: Any) -> keras.Model:
        """A model with random weights, no dropout, and no preprocessor.

        Args:
            seed: Of the weights.
            **changes: Of the backbone's arguments.
        """
        import keras_hub

        keras.utils.set_random_seed(seed)
        options = {**_COMMON, **self.options, **changes}
        options = {k: v for k, v in options.items() if v is not None}
        backbone = getattr(keras_hub.models, self.backbone)(**options)
        model = backbone
        if self.task is not None:
            task = getattr(keras_hub.models, self.task)
            model = task(backbone=backbone, preprocessor=None)
        rng = np.random.default_rng(seed)
        for variable in model.weights:
            noise = rng.normal(size=variable.shape).astype("float32")
            variable.assign(variable + 0.2 * noise)
        return model

    def shared(self) -> keras.Model:
        """The model that `make` returns, one for all tests.

        They leave it as it is: to make one takes longer than most of what is
        asked of it.
        """
        return _shared(self.name)

    def writer(self) -> keras.Model:
        """A language model with a tokenizer, for `TEXT_LENGTH` tokens.

        It is not trained, but what it writes varies.
        """
        changes = {"vocabulary_size": PIECES}
        if "max_sequence_length" in self.options:
            changes["max_sequence_length"] = TEXT_LENGTH
        task = self.make(**changes)
        # So that no token calls for itself, as in a tied table it would.
        *_, norm = (
            layer
            for layer in task.backbone.layers
            if "norm" in layer.name and layer.weights
        )
        scale = norm.weights[0]
        rng = np.random.default_rng(0)
        scale.assign(2 * rng.normal(size=scale.shape).astype("float32"))
        preprocessor = task.preprocessor_cls
        tokenizer = _tokenizer(preprocessor.tokenizer_cls)
        return type(task)(
            backbone=task.backbone,
            preprocessor=preprocessor(tokenizer=tokenizer),
        )

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """A batch of two, as the model's inputs are named and shaped."""
        rng = np.random.default_rng(seed)
        batch = {}
        for name, tensor in self._symbolic_inputs().items():
            shape = [2, *tensor.shape[1:]]
            if name == "encoder_features":
                shape[1] = LENGTH
            shape = [LENGTH if size is None else size for size in shape]
            if "padding_mask" in name:
                values = np.ones(shape)
                values[-1, -2:] = 0
            elif "segment" in name:
                values = rng.integers(2, size=shape)
            elif "mask_positions" in name:
                shape[1] = 2
                values = np.array([[1, 3], [2, 4]])
            elif "features" in name:
                values = rng.normal(size=shape)
            else:
                values = rng.integers(1, VOCABULARY, size=shape)
            batch[name] = values.astype(tensor.dtype)
        return batch

    def prompt(self) -> dict[str, np.ndarray]:
        """Inputs of `generate`: four tokens of eight are given."""
        if not self.translates:
            return _half_prompt()
        encoder, decoder = self.inputs(), _half_prompt()
        return {
            name: encoder[name] if "encoder" in name else value
            for name, value in (
                ("encoder_token_ids", None),
                ("encoder_padding_mask", None),
                ("decoder_token_ids", decoder["token_ids"]),
                ("decoder_padding_mask", decoder["padding_mask"]),
            )
        }

    def _symbolic_inputs(self) -> dict[str, keras.KerasTensor]:
        inputs = self.shared().input
        if isinstance(inputs, dict):
            return inputs
        return {tensor.name: tensor for tensor in inputs}


def _half_prompt() -> dict[str, np.ndarray]:
    ids = np.zeros((2, LENGTH), "int32")
    ids[:, : LENGTH // 2] = [[5, 9, 2, 31], [7, 1, 40, 3]]
    return {"token_ids": ids, "padding_mask": (ids != 0).astype("int32")}


@cache
def _tokenizer(kind: type) -> Any:
    """Of a class of KerasHub, with pieces of Python's manual."""
    import keras_hub

    if issubclass(kind, keras_hub.tokenizers.BytePairTokenizer):
        return kind(*byte_pairs(paragraphs(), PIECES, _SPECIAL_TOKENS))
    options = {}
    if kind is keras_hub.tokenizers.Gemma3Tokenizer:
        options["has_vision_tokens"] = False
    pieces = sentence_pieces(
        paragraphs(),
        PIECES,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=["<bos>", "<eos>", "<|endoftext|>"],
    )
    return kind(pieces, **options)


# Of all tokenizers of byte pairs.
_SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<s>",
    "<pad>",
    "</s>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_end|>",
]
FIXED = "fixed length"
UNTIED = "two in one layer, look-up and projection, both factorized"

ARCHITECTURES = [
    Architecture("BERT", "BertBackbone", "BertMaskedLM", _HEADS | _POSITIONS),
    Architecture(
        "RoBERTa", "RobertaBackbone", "RobertaMaskedLM", _HEADS | _POSITIONS
    ),
    Architecture(
        "XLM-RoBERTa",
        "XLMRobertaBackbone",
        "XLMRobertaMaskedLM",
        _HEADS | _POSITIONS,
    ),
    Architecture(
        "DistilBERT",
        "DistilBertBackbone",
        "DistilBertMaskedLM",
        _HEADS | _POSITIONS,
    ),
    Architecture(
        "ALBERT",
        "AlbertBackbone",
        "AlbertMaskedLM",
        _HEADS | _POSITIONS | dict(embedding_dim=12),
    ),
    Architecture(
        "DeBERTa-v3",
        "DebertaV3Backbone",
        "DebertaV3MaskedLM",
        _HEADS | _POSITIONS | dict(bucket_size=4),
        exports="no: its relative positions fail at run time",
    ),
    Architecture(
        "ELECTRA",
        "ElectraBackbone",
        None,
        _HEADS
        | _POSITIONS
        | dict(vocabulary_size=None, vocab_size=VOCABULARY, embedding_dim=12),
        tables="one; KerasHub has no task for it",
    ),
    Architecture(
        "FNet",
        "FNetBackbone",
        "FNetMaskedLM",
        _POSITIONS,
        exports="no: LiteRT has no complex numbers",
    ),
    Architecture(
        "RoFormer-v2",
        "RoformerV2Backbone",
        "RoformerV2MaskedLM",
        _HEADS | dict(head_size=8),
        exports="no: its rotary positions fail at run time",
    ),
    Architecture("GPT-2", "GPT2Backbone", "GPT2CausalLM", _HEADS | _POSITIONS),
    Architecture("OPT", "OPTBackbone", "OPTCausalLM", _HEADS | _POSITIONS),
    Architecture("BLOOM", "BloomBackbone", "BloomCausalLM", _HEADS),
    Architecture(
        "Falcon",
        "FalconBackbone",
        "FalconCausalLM",
        dict(num_attention_heads=2),
        exports=FIXED,
    ),
    Architecture(
        "GPT-NeoX",
        "GPTNeoXBackbone",
        "GPTNeoXCausalLM",
        _HEADS | _POSITIONS,
        refused="KerasHub turns its cached queries as if they came first",
    ),
    Architecture(
        "Llama",
        "LlamaBackbone",
        "LlamaCausalLM",
        _GROUPED,
        UNTIED,
        exports=FIXED,
    ),
    Architecture(
        "Llama, tied",
        "LlamaBackbone",
        "LlamaCausalLM",
        _GROUPED | dict(tie_word_embeddings=True),
        exports=FIXED,
    ),
    Architecture(
        "Llama 3",
        "Llama3Backbone",
        "Llama3CausalLM",
        _GROUPED,
        UNTIED,
        exports=FIXED,
    ),
    Architecture(
        "Mistral",
        "MistralBackbone",
        "MistralCausalLM",
        _GROUPED,
        UNTIED,
        exports=FIXED,
    ),
    Architecture(
        "Mixtral",
        "MixtralBackbone",
        "MixtralCausalLM",
        _GROUPED | dict(num_experts=2),
        UNTIED,
        exports=FIXED,
    ),
    Architecture(
        "Gemma",
        "GemmaBackbone",
        "GemmaCausalLM",
        _GROUPED | dict(head_dim=8),
        exports=FIXED,
    ),
    Architecture(
        "Gemma 2",
        "GemmaBackbone",
        "GemmaCausalLM",
        _GROUPED
        | dict(
            head_dim=8,
            use_post_ffw_norm=True,
            use_post_attention_norm=True,
            attention_logit_soft_cap=50.0,
            final_logit_soft_cap=30.0,
            use_sliding_window_attention=True,
            sliding_window_size=4,
        ),
        "one, tied, with a soft cap of the logits",
        exports=FIXED,
    ),
    Architecture(
        "Gemma 3",
        "Gemma3Backbone",
        "Gemma3CausalLM",
        _GROUPED | dict(head_dim=8, image_size=16),
        "one, tied (text; without the vision encoder)",
        exports=FIXED,
    ),
    Architecture(
        "Qwen 2.5", "QwenBackbone", "QwenCausalLM", _GROUPED, exports=FIXED
    ),
    Architecture(
        "Qwen 3",
        "Qwen3Backbone",
        "Qwen3CausalLM",
        _GROUPED | dict(head_dim=8),
        exports=FIXED,
    ),
    Architecture(
        "Phi-3", "Phi3Backbone", "Phi3CausalLM", _GROUPED, UNTIED, exports=FIXED
    ),
    Architecture("BART", "BartBackbone", "BartSeq2SeqLM", _HEADS | _POSITIONS),
    Architecture(
        "T5",
        "T5Backbone",
        "T5Seq2SeqLM",
        _HEADS,
        exports=FIXED,
    ),
    Architecture(
        "T5 1.1, untied",
        "T5Backbone",
        "T5Seq2SeqLM",
        _HEADS | dict(tie_embedding_weights=False),
        UNTIED,
        exports=FIXED,
    ),
    Architecture(
        "Whisper",
        "WhisperBackbone",
        None,
        _HEADS
        | dict(
            num_mels=5,
            max_encoder_sequence_length=LENGTH,
            max_decoder_sequence_length=LENGTH,
        ),
        "one; KerasHub has no task for it",
    ),
]


@cache
def _shared(name: str) -> keras.Model:
    return next(a for a in ARCHITECTURES if a.name == name).make()


def supported_table() -> str:
    """What is supported, in Markdown: one row for each architecture here."""
    lines = [
        "| architecture | tested as | its tables | generates | LiteRT "
        "| LiteRT-LM |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {a.name} | `{a.task or a.backbone}` | {a.tables} | "
        f"{'yes' if a.generates else ''} | {a.exports} | {a.writes} |"
        for a in ARCHITECTURES
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(supported_table())
