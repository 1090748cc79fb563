"""Keras's `run_layer_test` over the configurations of the layer."""

import itertools

import numpy as np
import pytest
from absl.testing import parameterized
from keras.src import backend
from keras.src import testing

from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.layers import VocabularyProjection

SIZE = {"input_dim": 11, "output_dim": 6, "rank": 3}
CHOICES = {
    "activation": ("relu", None),
    "use_bias": (True, False),
    "tie_weights": (True, False),
    "mask_zero": (False, True),
    "quantization": (None, "int8", "int4"),
}
CONFIGURATIONS = [
    {"testcase_name": "_".join(map(str, values)), **dict(zip(CHOICES, values))}
    for values in itertools.product(*CHOICES.values())
]
DTYPES = (
    "float32",
    "bfloat16",
    "mixed_float16",
    "mixed_bfloat16",
    "int8_from_float32",
    "int4_from_mixed_bfloat16",
)


def numbers_of_weights(options):
    """Of the factors, and of what they are rounded to and trained in.

    Returns how many are trained, and how many are not: centers, rotations, and
    the scales of 8 bits.
    """
    trained, others = 3 if options.get("use_bias", True) else 2, 0
    named = options.get("quantization") or options.get("dtype", "")
    if named.startswith("int8"):
        others = 3
    elif named.startswith("int4"):
        trained, others = trained + 1, 2
    tables = 1 if options.get("tie_weights", True) else 2
    return tables * trained, tables * others


class LayerTest(testing.TestCase):
    def check(self, options, **expected):
        """Both directions: look-up, and the projection."""
        trained, others = numbers_of_weights(options)
        shared = {
            "expected_num_trainable_weights": trained,
            "expected_num_non_trainable_weights": others,
            "expected_num_losses": 0,
            "supports_masking": True,
        }
        self.run_layer_test(
            DistilledEmbedding,
            SIZE | options,
            input_data=np.array([[1, 0, 10], [0, 3, 3]], "int32"),
            expected_output_shape=(2, 3, 6),
            **shared | expected,
        )
        self.run_layer_test(
            DistilledEmbedding,
            SIZE | options,
            input_shape=(2, 3, 6),
            input_dtype="float32",
            call_kwargs={"reverse": True},
            expected_output_shape=(2, 3, 11),
            # It calls `compute_output_spec` without `reverse`.
            run_mixed_precision_check=False,
            **shared | expected,
        )

    @parameterized.named_parameters(*CONFIGURATIONS)
    def test_options(self, **options):
        self.check(options)

    @parameterized.parameters(*DTYPES)
    def test_dtypes(self, dtype):
        self.check({"dtype": dtype})

    @parameterized.parameters("bfloat16", "float16")
    def test_reverse_dtype(self, dtype):
        self.run_layer_test(
            DistilledEmbedding,
            SIZE | {"reverse_dtype": dtype, "logit_soft_cap": 2.0},
            input_shape=(2, 3, 6),
            input_dtype="float32",
            call_kwargs={"reverse": True},
            expected_output_shape=(2, 3, 11),
            expected_output_dtype=dtype,
            run_mixed_precision_check=False,
        )

    def test_lora(self):
        self.check(
            {"lora_rank": 2, "lora_alpha": 3.0},
            expected_num_trainable_weights=2,
            expected_num_non_trainable_weights=3,
        )

    def test_regularizer_and_constraint(self):
        self.check(
            {
                "embeddings_regularizer": "l2",
                "embeddings_constraint": "non_neg",
            },
            expected_num_losses=2,
        )

    @parameterized.parameters("int64", "uint8", "float32")
    def test_ids(self, dtype):
        self.run_layer_test(
            DistilledEmbedding,
            SIZE | {"mask_zero": True},
            input_data=np.array([[1, 0, 10], [0, 3, 3]], dtype),
            expected_output_shape=(2, 3, 6),
        )

    @parameterized.parameters(*itertools.product((False, True), (None, "int8")))
    @pytest.mark.skipif(
        not backend.SUPPORTS_SPARSE_TENSORS, reason="no sparse tensors"
    )
    def test_sparse_ids(self, mask_zero, quantization):
        self.run_layer_test(
            DistilledEmbedding,
            SIZE | {"mask_zero": mask_zero, "quantization": quantization},
            input_shape=(2, 3),
            input_dtype="int32",
            input_sparse=True,
            expected_output_shape=(2, 3, 6),
        )

    @parameterized.parameters(*itertools.product((False, True), (None, "int8")))
    @pytest.mark.skipif(
        not backend.SUPPORTS_RAGGED_TENSORS, reason="no ragged tensors"
    )
    def test_ragged_ids(self, mask_zero, quantization):
        self.run_layer_test(
            DistilledEmbedding,
            SIZE | {"mask_zero": mask_zero, "quantization": quantization},
            input_shape=(2, 3),
            input_dtype="int32",
            input_ragged=True,
            expected_output_shape=(2, None, 6),
            expected_output_ragged=True,
        )

    def test_vocabulary_projection(self):
        for activation, use_bias in itertools.product(
            (None, "softmax"), (True, False)
        ):
            embedding = DistilledEmbedding(**SIZE)
            embedding.build()
            self.run_layer_test(
                VocabularyProjection,
                {
                    "embedding": embedding,
                    "activation": activation,
                    "use_bias": use_bias,
                },
                input_shape=(2, 3, 6),
                input_dtype="float32",
                expected_output_shape=(2, 3, 11),
                supports_masking=True,
            )
