"""Trains a student on one device, or on several; `test_distribution` runs it.

    python -m tests.on_devices FOLDER NAME...

The devices are parts of the processor, which the engines must be told of
before they start, JAX by `XLA_FLAGS`: hence a process of its own. FOLDER gets a
file of what came of each.
"""

import re
import sys

import keras
import numpy as np

import keras_distilled_embedding as kde

VOCABULARY, WIDTH, RANK = 64, 16, 4
BATCH, LENGTH = 8, 6
LOSSES = {"logits": kde.LogitsDistillation, "table": kde.EmbeddingDistillation}


def teacher_model():
    """A language model with one tied table."""
    keras.utils.set_random_seed(0)
    ids = keras.Input((LENGTH,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(
        VOCABULARY,
        WIDTH,
        name="tokens",
        embeddings_initializer=keras.initializers.RandomNormal(
            stddev=1.0, seed=0
        ),
    )
    dense = keras.layers.Dense(WIDTH, activation="tanh", name="dense")
    return keras.Model(ids, embedding(dense(embedding(ids)), reverse=True))


def batches(number=3):
    rng = np.random.default_rng(0)
    shape = (number * BATCH, LENGTH)
    ids, labels = rng.integers(VOCABULARY, size=(2, *shape)).astype("int32")
    # As much in each half of a batch: replicas of TensorFlow, unlike those of
    # JAX, average their own tokens.
    half = rng.uniform(size=(number, 1, BATCH // 2, LENGTH)) < 0.8
    weights = np.tile(half, (1, 2, 1, 1)).reshape(shape).astype("float32")
    return ids, labels, weights


def make_distiller():
    teacher = teacher_model()
    student = kde.compress(teacher, rank=RANK, verbose=0)
    distiller = kde.Distiller(
        teacher, student, [loss() for loss in LOSSES.values()]
    )
    distiller.compile(
        keras.optimizers.SGD(0.5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return distiller


def train(distiller):
    """Its weights, and the losses of each batch."""
    losses = []
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda _, logs: losses.append(logs["loss"])
    )
    ids, labels, weights = batches()
    arrays = dict(x=ids, y=labels, sample_weight=weights, batch_size=BATCH)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # The batches as they are, not as Keras would divide them.
        data = tf.data.Dataset.from_tensor_slices((ids, labels, weights))
        arrays = dict(x=data.batch(BATCH))
    distiller.fit(
        **arrays, epochs=1, shuffle=False, verbose=0, callbacks=[keep]
    )
    weights = distiller.student.weights
    found = {w.path: keras.ops.convert_to_numpy(w) for w in weights}
    return {**found, "losses": np.array(losses)}


def one_device():
    return train(make_distiller())


def mirrored():
    """Two devices, half a batch each."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        distiller = make_distiller()
    assert strategy.num_replicas_in_sync == 2
    return train(distiller)


def data_parallel():
    """Four devices, a quarter of a batch each."""
    distribution = keras.distribution.DataParallel(
        devices=keras.distribution.list_devices("cpu")
    )
    with distribution.scope():
        return train(make_distiller())


def model_parallel():
    """Two devices along the batch, two along the vocabulary."""
    mesh = keras.distribution.DeviceMesh(
        (2, 2),
        ("batch", "model"),
        keras.distribution.list_devices("cpu"),
    )
    # As in docs/scale.md.
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map["(.*/)?((reverse_)?codes|lora_codes_a)"] = ("model", None)
    layout_map["(.*/)?tokens/embeddings"] = ("model", None)
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )
    with distribution.scope():
        distiller = make_distiller()
        found = train(distiller)
        student = distiller.student
        layer = student.get_layer("tokens")
        parts = {
            "codes_part": layer.codes.value,
            "basis_part": layer.basis.value,
            "teacher_part": distiller.teacher.get_layer(
                "tokens"
            ).embeddings.value,
        }
        for name, value in parts.items():
            found[name] = np.array(value.addressable_shards[0].data.shape)
        found["gathered"] = np.array(gathered_rows(student))
    return found


def gathered_rows(student):
    """The most rows of anything that the compiled forward pass gathers."""
    import jax

    others = [v.value for v in student.non_trainable_variables]

    def forward(variables, ids):
        return student.stateless_call(variables, others, ids)[0]

    variables = [v.value for v in student.trainable_variables]
    layout = keras.distribution.distribution().get_data_layout((BATCH, LENGTH))
    ids = jax.device_put(batches()[0][:BATCH], layout.backend_layout)
    compiled = jax.jit(forward).lower(variables, ids).compile()
    output = compiled.output_shardings
    assert output.spec[-1] == "model", output  # a part of the vocabulary each
    text = compiled.as_text()
    assert "all-reduce" in text  # the pattern below would find something
    shapes = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather", text)
    return [int(shape.split(",")[0]) for shape in shapes] or [0]


if __name__ == "__main__":
    for name in sys.argv[2:]:
        np.savez(f"{sys.argv[1]}/{name}.npz", **globals()[name]())
