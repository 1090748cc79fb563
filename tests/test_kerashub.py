"""The matrix: KerasHub's architectures, compressed, trained and saved.

Each is compared with a dense model that holds the tables which the factors
stand for.
"""

from pathlib import Path

import keras
import numpy as np
import pytest

from keras_distilled_embedding import compress
from keras_distilled_embedding import export_litert
from keras_distilled_embedding import export_litertlm
from keras_distilled_embedding import keras_internals
from keras_distilled_embedding import load_model
from keras_distilled_embedding import save_model
from keras_distilled_embedding.export import causal_lm
from keras_distilled_embedding.export.tokenizers import stop_tokens
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding_runner import Runner
from tests.architectures import ARCHITECTURES
from tests.architectures import FIXED
from tests.architectures import LENGTH
from tests.architectures import TEXT_LENGTH
from tests.architectures import VOCABULARY
from tests.architectures import supported_table
from tests.shared import basis_and_offset
from tests.shared import to_numpy

pytest.importorskip("keras_hub")

pytestmark = [
    # KerasHub's own: T5's attention drops the mask that it is passed.
    pytest.mark.filterwarnings("ignore:Layer '.*_attention':UserWarning"),
    # Pooled outputs that the loss does not use.
    pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning"),
    # A file that KerasHub does not close.
    pytest.mark.filterwarnings("ignore:Exception ignored in.*vocabulary.spm"),
]
MATRIX = pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.name) for a in ARCHITECTURES],
)
EXPORTED = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(a, id=a.name)
        for a in ARCHITECTURES
        if not a.exports.startswith("no: ")
    ],
)
WRITERS = pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.name) for a in ARCHITECTURES if a.writes == "yes"],
)
TOLERANCE = 1e-4
STUDENTS = {}


def student_of(architecture):
    """The shared model with factors of rank 4, made once."""
    if architecture.name not in STUDENTS:
        STUDENTS[architecture.name] = compress(
            architecture.shared(), rank=4, verbose=0
        )
    return STUDENTS[architecture.name]


def outputs_of(model, batch):
    outputs = model(batch, training=False)
    return [to_numpy(x) for x in keras.tree.flatten(outputs)]


def assert_close(left, right, tolerance=TOLERANCE):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def factorized_layers(model):
    return [
        layer
        for layer in keras_internals.iterate_layers(model)
        if isinstance(layer, DistilledEmbedding)
    ]


def reconstructed(layer, prefix=""):
    if layer.quantization is not None:
        return to_numpy(layer.reconstruct(reverse=bool(prefix)))
    basis, offset = basis_and_offset(layer, prefix)
    codes = to_numpy(getattr(layer, prefix + "codes"))
    return np.maximum(codes, 0) @ basis + offset


def assign_reconstructed(model, student):
    """Gives a dense model the tables that its compressed copy stands for."""
    for layer in factorized_layers(student):
        (dense,) = (
            found
            for found in keras_internals.iterate_layers(model)
            if found.name == layer.name
            and isinstance(found, keras.layers.Embedding)
        )
        tables = [reconstructed(layer)]
        if not layer.tie_weights:
            tables.append(reconstructed(layer, "reverse_").T)
        dense.set_weights(tables)


def weights_by_layer(model):
    """Each layer's own weights, but those of the token tables."""
    return [
        (layer.name, [to_numpy(w) for w in layer.weights])
        for layer in keras_internals.iterate_layers(model)
        if not layer._layers and layer.name != "token_embedding"
    ]


@MATRIX
def test_equals_the_dense_model_of_the_reconstructed_tables(architecture):
    model, batch = architecture.shared(), architecture.inputs()
    before = outputs_of(model, batch)
    weights = model.get_weights()
    student = compress(model, rank=4, verbose=0)
    STUDENTS[architecture.name] = student
    assert_close(outputs_of(model, batch), before, 0)  # is as it was
    assert type(student) is type(model)
    assert student.name == model.name
    (factorized,) = factorized_layers(student)
    assert factorized.name == "token_embedding"
    assert student.count_params() < model.count_params()
    for (name, left), (other, right) in zip(
        weights_by_layer(model), weights_by_layer(student), strict=True
    ):
        assert name == other
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a, b)
    shapes = [tuple(weight.shape) for weight in student.weights]
    assert (factorized.input_dim, factorized.output_dim) not in shapes
    assert not {id(w) for w in student.weights} & {id(w) for w in model.weights}

    changed = outputs_of(student, batch)
    assert np.abs(changed[0] - before[0]).max() > 100 * TOLERANCE
    assign_reconstructed(model, student)
    of_products = outputs_of(model, batch)
    model.set_weights(weights)
    assert_close(of_products, changed)


@MATRIX
def test_trains_saves_and_loads(architecture, tmp_path):
    """With codes that are rounded to 8 bits."""
    batch = architecture.inputs()
    student = compress(
        architecture.shared(),
        rank=4,
        quantization="int8",
        layers="token_embedding",  # in integers segments get smaller, too
        verbose=0,
    )
    if architecture.task is None:
        student.compile("adam", loss="mse", run_eagerly=True)
        targets = keras.tree.map_structure(
            lambda x: np.zeros_like(to_numpy(x)), student(batch)
        )
    else:
        student.compile(run_eagerly=True)
        targets = np.zeros(outputs_of(student, batch)[0].shape[:-1], "int32")
    (factorized,) = factorized_layers(student)
    codes = to_numpy(factorized.codes)
    student.fit(batch, targets, shuffle=False, verbose=0)
    assert np.abs(to_numpy(factorized.codes) - codes).max() > 1e-5
    save_model(student, tmp_path / "student.keras")
    loaded = load_model(tmp_path / "student.keras")
    assert type(loaded) is type(student)
    (layer,) = factorized_layers(loaded)
    assert layer.quantization == "int8"
    assert_close(outputs_of(loaded, batch), outputs_of(student, batch), 1e-6)
    with pytest.raises(ValueError, match="keras_distilled_embedding.save_mod"):
        student.save(tmp_path / "own.keras")
    assert not (tmp_path / "own.keras").exists()


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.name) for a in ARCHITECTURES if a.generates],
)
def test_generates(architecture, tmp_path):
    """The same text as the dense model, before saving and after.

    With codes that are rounded to 4 bits.
    """
    model = architecture.make()
    student = compress(model, rank=4, quantization="int4", verbose=0)
    save_model(student, tmp_path / "student.keras")
    assign_reconstructed(model, student)
    expected, *found = (
        generate(x, architecture.prompt())
        for x in (model, student, load_model(tmp_path / "student.keras"))
    )
    assert len(np.unique(expected)) > 4
    for ids in found:
        np.testing.assert_array_equal(ids, expected)


def generate(model, prompt):
    # Eagerly: to trace it takes longer than to run it once.
    model.compile(sampler="greedy", run_eagerly=True)
    # Not `generate`, which puts outputs together, where Gemma 3 has `None`.
    outputs = model.make_generate_function()(prompt, stop_token_ids=None)
    key = "token_ids" if "token_ids" in outputs else "decoder_token_ids"
    return to_numpy(outputs[key])


@WRITERS
def test_steps_with_caches_are_the_whole(architecture):
    """What goes into a bundle of LiteRT-LM: a prompt, then two tokens."""
    student = student_of(architecture)
    ids = np.random.default_rng(0).integers(1, VOCABULARY, size=(1, 6))
    whole = student({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    form, models = causal_lm.step_models(student, LENGTH, [4])
    state = causal_lm.empty_caches(form)
    for name, positions in (
        ("prefill_4", range(4)),
        ("decode", [4]),
        ("decode", [5]),
    ):
        inputs = {
            "tokens": ids[:, list(positions)].astype("int32"),
            "input_pos": np.array(positions, "int32"),
        }
        state.pop("logits", None)
        state = models[name](
            keras.tree.map_structure(
                keras.ops.convert_to_tensor, {**inputs, **state}
            )
        )
    assert_close([to_numpy(state["logits"])[0, 0]], [to_numpy(whole)[0, 5]])


PROMPTS = ["The return statement", "If a class is"]


def export_writer(task, path, quantization=None):
    return export_litertlm(
        task,
        path,
        max_length=TEXT_LENGTH,
        prefill_lengths=[4],
        quantization=quantization,
        prompts=PROMPTS,
        verbose=False,
    )


@WRITERS
def test_writes_what_keras_does(architecture, tmp_path):
    """At 8x, id by id, without Keras."""
    pytest.importorskip("litert_lm_builder")
    task = compress(architecture.writer(), compression=8.0, verbose=0)
    path = tmp_path / "student.litertlm"
    report = export_writer(task, path, "float32")
    assert report.tables["token_embedding"] == 1
    assert report.fidelity.relative_rms_error < 1e-5
    runner = Runner(path)
    bare = type(task)(backbone=task.backbone, preprocessor=None)
    stops = stop_tokens(task.preprocessor.tokenizer)
    seen = set()
    for prompt in PROMPTS:
        read = task.preprocessor.generate_preprocess(
            [prompt], sequence_length=TEXT_LENGTH
        )
        start = int(to_numpy(read["padding_mask"]).sum())
        wanted = generate(bare, read)[0, start:].tolist()
        found = list(runner.stream_ids(prompt))
        end = next((i for i, x in enumerate(wanted) if x in stops), None)
        assert found == wanted[:end]
        seen.update(found)
    assert len(seen) > 2


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.name) for a in ARCHITECTURES if a.refused],
)
def test_refuses_what_would_write_something_else(architecture, tmp_path):
    pytest.importorskip("litert_lm_builder")
    with pytest.raises(
        ValueError, match=f"at once or in pieces.*{architecture.task}"
    ):
        export_writer(architecture.writer(), tmp_path / "student.litertlm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(a, id=a.name)
        for a in ARCHITECTURES
        if a.name in ("GPT-2", "Llama", "Gemma 3")
    ],
)
def test_predicts_in_few_bits_what_keras_does(architecture, tmp_path):
    """Token by token, with the hidden states' 8 bits in every layer."""
    pytest.importorskip("litert_lm_builder")
    for quantization in ("int8", "int4", "int2"):
        task = compress(
            architecture.writer(), rank=8, quantization=quantization, verbose=0
        )
        report = export_writer(task, tmp_path / quantization)
        assert report.quantization == quantization
        assert report.tables["token_embedding"] == 1
        assert report.fidelity.divergence < 1e-3


@EXPORTED
def test_exports(architecture, tmp_path):
    """To LiteRT, one copy of the tables, with the outputs of Keras."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    student = student_of(architecture)
    path, batch = tmp_path / "student.tflite", architecture.inputs()
    length = LENGTH if architecture.exports == FIXED else None
    report = export_litert(student, path, sequence_length=length, verbose=False)
    assert report.tables["token_embedding"] == 1
    runner = interpreter.Interpreter(str(path)).get_signature_runner()
    outputs = runner(**batch)
    expected = student(batch)
    if not isinstance(expected, dict):
        expected = {"output_0": expected}
    assert_close(
        [outputs[name] for name in expected],
        [to_numpy(x) for x in expected.values()],
    )


@EXPORTED
def test_exports_at_8x(architecture, tmp_path):
    """Rank and bits as planned, and the file's logits are Keras's."""
    student = compress(architecture.shared(), compression=8.0, verbose=0)
    (layer,) = (
        x for x in factorized_layers(student) if x.name == "token_embedding"
    )
    assert layer.quantization is not None
    assert layer.compression_ratio >= 8.0
    length = LENGTH if architecture.exports == FIXED else None
    report = export_litert(
        student,
        tmp_path / "student.tflite",
        sequence_length=length,
        fidelity_inputs=[architecture.inputs()],
        verbose=False,
    )
    assert report.quantization == layer.quantization
    assert report.tables["token_embedding"] == 1
    # The hidden states' 8 bits, in every layer.
    assert report.fidelity.relative_rms_error < 0.05


def test_what_needs_a_fixed_length_says_so(tmp_path):
    architecture = next(a for a in ARCHITECTURES if a.exports == FIXED)
    student = student_of(architecture)
    with pytest.raises(ValueError, match="A `sequence_length` may help"):
        export_litert(student, tmp_path / "x.tflite", verbose=False)
    assert not list(tmp_path.iterdir())


def test_the_table_in_the_documentation_is_of_this_matrix():
    page = Path(__file__).parents[1] / "docs" / "compress-your-model.md"
    assert supported_table() in page.read_text()
