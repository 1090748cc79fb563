"""KerasHub's `run_backbone_test` and `run_task_test` on compressed models."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from typing import Any

import keras
import keras_hub
import sentencepiece
from absl.testing import parameterized
from keras import ops

import keras_distilled_embedding as kde
from tests.architectures import ARCHITECTURES
from tests.architectures import LENGTH
from tests.architectures import Architecture
from tests.peers.adapt import FOLDER


def load_test_case() -> Any:
    """KerasHub's test case, which is no part of what is installed."""
    path = FOLDER / "test_case.py"
    spec = importlib.util.spec_from_file_location("kerashub_test_case", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.TestCase


class Students:
    """In the place of a class of KerasHub: what it makes is compressed."""

    def __init__(self, cls: type[keras.Model]) -> None:
        self.cls = cls
        self.__name__ = cls.__name__

    def __call__(self, **options: Any) -> keras.Model:
        return kde.compress(self.cls(**options), rank=3, verbose=0)

    def from_config(self, config: dict[str, Any]) -> keras.Model:
        return kde.compress(self.cls.from_config(config), rank=3, verbose=0)


def backbone_options(architecture: Architecture) -> dict[str, Any]:
    """Arguments of its backbone."""
    model = architecture.make()
    config = getattr(model, "backbone", model).get_config()
    for key in ("name", "trainable", "dtype"):
        config.pop(key)
    return config


SPECIAL_TOKENS = [
    *("<pad>", "<s>", "</s>", "<unk>", "<bos>", "<eos>", "<|endoftext|>"),
    *("<start_of_turn>", "<end_of_turn>"),
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
]
# A kind of task, of tokenizer and of table each: all would take an hour.
TASKS = ("BERT", "GPT-2", "Llama", "Gemma 2", "T5")
TEXTS = ["the quick fox", "a fox at the airport", "quick", "at the fox"]


def tokenizer(cls: type[keras.layers.Layer]) -> keras.layers.Layer:
    """A small tokenizer of a class of KerasHub."""
    words = sorted({word for text in TEXTS for word in text.split()})
    letters = sorted(set("".join(words)))
    if issubclass(cls, keras_hub.tokenizers.WordPieceTokenizer):
        return cls(vocabulary=SPECIAL_TOKENS + words)
    if issubclass(cls, keras_hub.tokenizers.BytePairTokenizer):
        tokens = [*SPECIAL_TOKENS, *letters, "\u0120", "th", "the", "fo"]
        return cls(
            vocabulary={token: index for index, token in enumerate(tokens)},
            merges=["t h", "th e", "f o"],
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=len(SPECIAL_TOKENS) + len(letters) + 4,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        user_defined_symbols=SPECIAL_TOKENS[4:],
        minloglevel=2,
    )
    return cls(proto=model.getvalue())


class KerasHubTest(load_test_case()):
    def run_student_saving_test(self, model):
        """In the place of a round trip of its configuration."""
        self.assertRaisesRegex(ValueError, "save_model", model.get_config)
        path = os.path.join(self.get_temp_dir(), "student.keras")
        kde.save_model(model, path)
        loaded = kde.load_model(path)
        self.assertIs(type(loaded), type(model))
        self.assertLen(loaded.weights, len(model.weights))
        for left, right in zip(loaded.weights, model.weights):
            self.assertEqual(left.name, right.name)
            self.assertAllEqual(left, right)

    @parameterized.named_parameters((a.name, a) for a in ARCHITECTURES)
    def test_backbone(self, architecture):
        cls = getattr(keras_hub.models, architecture.backbone)
        options = backbone_options(architecture)
        backbone = cls(**options)
        batch = {
            name: ops.convert_to_tensor(values)
            for name, values in architecture.inputs().items()
            if name in backbone.input
        }
        shapes = keras.tree.map_structure(lambda x: x.shape, backbone(batch))
        self.run_backbone_test(
            cls=Students(cls),
            init_kwargs=options,
            input_data=batch,
            expected_output_shape=shapes,
            # Mixtral numbers its blocks anew in each model, so that a map of
            # dtype policies does not find them; KerasHub's test skips it, too.
            run_quantization_check=architecture.name != "Mixtral",
        )

    @parameterized.named_parameters(
        (a.name, a) for a in ARCHITECTURES if a.name in TASKS
    )
    def test_task(self, architecture):
        cls = getattr(keras_hub.models, architecture.task)
        data, settings = TEXTS, {"sequence_length": LENGTH}
        if "Seq2Seq" in architecture.task:
            data = {"encoder_text": TEXTS, "decoder_text": TEXTS[::-1]}
            settings = {
                f"{part}_sequence_length": LENGTH
                for part in ("encoder", "decoder")
            }
        if "MaskedLM" in architecture.task:
            # The same masks each time.
            settings |= {
                "mask_selection_rate": 1.0,
                "mask_token_rate": 1.0,
                "random_token_rate": 0.0,
                "mask_selection_length": LENGTH,
            }
        tokens = tokenizer(cls.preprocessor_cls.tokenizer_cls)
        size = tokens.vocabulary_size()
        options = backbone_options(architecture) | {"vocabulary_size": size}
        backbone = getattr(keras_hub.models, architecture.backbone)(**options)
        self.run_task_test(
            cls=Students(cls),
            init_kwargs={
                "backbone": backbone,
                "preprocessor": cls.preprocessor_cls(tokens, **settings),
            },
            train_data=(data,),
            expected_output_shape=(len(TEXTS), LENGTH, size),
        )
