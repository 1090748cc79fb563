"""Random models: what `compress` makes computes what its factors stand for.

The reference is the same model with full tables, which hold the products of
the factors.
"""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

import keras_distilled_embedding as kde
from keras_distilled_embedding.layers import DistilledEmbedding
from tests.shared import to_numpy

DTYPES = ["int32", "int8", "uint8"]
EXAMPLES = 10
if keras.backend.backend() != "jax":  # has 64 bits where asked for only
    DTYPES.append("int64")
    EXAMPLES = 25  # JAX compiles anew for each


@st.composite
def tables(draw):
    """Shape and options of an embedding."""
    return {
        # Few, since every other shape is compiled anew.
        "input_dim": draw(st.sampled_from([16, 27, 40])),
        "output_dim": draw(st.sampled_from([8, 11])),
        "mask_zero": draw(st.booleans()),
        "tie_weights": draw(st.booleans()),
        "logit_soft_cap": draw(st.sampled_from([None, 2.0])),
    }


@st.composite
def graphs(draw):
    """Tables, and how a model uses them, each as often as it likes."""
    shapes = draw(st.lists(tables(), min_size=1, max_size=3))
    uses = draw(
        st.lists(
            st.tuples(
                st.integers(0, len(shapes) - 1),
                st.sampled_from(["look-up", "project", "dense"]),
                st.booleans(),  # in a model of its own
            ),
            min_size=1,
            max_size=5,
        )
    )
    return shapes, uses


def build(shapes, uses):
    """A model that takes ids and returns what each use computes."""
    ids = keras.Input((None,), dtype="int32")
    layers = [
        keras.layers.ReversibleEmbedding(**shape, name=f"table_{index}")
        for index, shape in enumerate(shapes)
    ]
    outputs, hidden = [], {}
    for index, (table, use, nested) in enumerate(uses):
        layer, width = layers[table], shapes[table]["output_dim"]
        if table not in hidden or use == "look-up":
            # The tables have different numbers of rows.
            found = layer(ops.mod(ids, shapes[table]["input_dim"]))
            hidden[table] = found
        elif use == "dense":
            dense = keras.layers.Dense(width, name=f"dense_{index}")
            hidden[table] = dense(hidden[table])
        if use != "project":
            outputs.append(hidden[table])
        elif not nested:
            outputs.append(layer(hidden[table], reverse=True))
        else:
            inner = keras.Input((None, width))
            head = keras.Model(
                inner, layer(inner, reverse=True), name=f"head_{index}"
            )
            outputs.append(head(hidden[table]))
    model = keras.Model(ids, outputs)
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.weights])
    return model


def with_products(graph, student):
    """A model of full tables, which are products of the student's factors."""
    reference = build(*graph)
    for layer in student.layers:
        if not isinstance(layer, DistilledEmbedding):
            continue
        full = reference.get_layer(layer.name)
        full.embeddings.assign(layer.embeddings)
        if not layer.tie_weights:
            full.reverse_embeddings.assign(layer.reverse_embeddings)
    return reference


FORMS = st.fixed_dictionaries(
    {
        "activation": st.sampled_from(["relu", None]),
        "use_bias": st.booleans(),
        "quantization": st.sampled_from([None, "int8", "int4", "int2"]),
    }
)


@pytest.mark.filterwarnings("ignore:.*does not support masking")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(graphs(), st.integers(1, 4), FORMS)
def test_compressed_graph_computes_with_its_products(graph, rank, form):
    keras.backend.clear_session()
    model = build(*graph)
    before = [weight.copy() for weight in model.get_weights()]
    student = kde.compress(model, rank=rank, verbose=0, **form)
    used = {f"table_{table}" for table, _, _ in graph[1]}
    found = {
        layer.name
        for layer in student.layers
        if isinstance(layer, DistilledEmbedding)
    }
    assert found == used
    ids = np.random.default_rng(0).integers(0, 100, size=(2, 5))
    expected = with_products(graph, student)(ids)
    for ours, reference in zip(student(ids), expected, strict=True):
        np.testing.assert_allclose(
            to_numpy(ours),
            to_numpy(reference),
            rtol=1e-4,
            atol=1e-5,
        )
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    tables(),
    st.integers(1, 5),
    st.sampled_from(["relu", "gelu", None]),
    FORMS,
    st.sampled_from([(), (0,), (1,), (2, 0), (0, 3), (2, 3), (2, 1, 3)]),
    st.sampled_from(DTYPES),
)
def test_layer_computes_with_its_table(
    table, rank, activation, form, shape, dtype
):
    """Any shape, empty ones too, any integers, any form of the factors."""
    form = {**form, "activation": activation}
    layer = DistilledEmbedding(**table, rank=rank, **form)
    layer.build()
    rng = np.random.default_rng(0)
    for variable in layer.weights:
        variable.assign(rng.normal(size=variable.shape))
    ids = rng.integers(table["input_dim"], size=shape).astype(dtype)
    expected = to_numpy(layer.embeddings)
    hidden = layer(ops.convert_to_tensor(ids))
    np.testing.assert_allclose(
        to_numpy(hidden), expected[ids], rtol=1e-5, atol=1e-6
    )
    kernel = expected.T
    if not table["tie_weights"]:
        kernel = to_numpy(layer.reverse_embeddings)
    logits = expected[ids] @ kernel
    if table["logit_soft_cap"]:
        cap = table["logit_soft_cap"]
        logits = cap * np.tanh(logits / cap)
    projected = layer(hidden, reverse=True)
    assert projected.shape == (*shape, table["input_dim"])
    np.testing.assert_allclose(
        to_numpy(projected), logits, rtol=1e-4, atol=1e-5
    )
