"""Several processes share a machine best with a core each."""

from __future__ import annotations


def limit_threads(number: int) -> None:
    """Lets TensorFlow use so many cores; before it does anything."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(number)
    tf.config.threading.set_inter_op_parallelism_threads(1)
