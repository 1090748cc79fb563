"""The parts of Keras that are not public."""

import keras

TESTED_KERAS = ">=3.15,<3.16"

try:
    from keras.src.backend import get_keras_mask
    from keras.src.backend.common.masking import set_keras_mask
    from keras.src.models.functional import Functional
    from keras.src.ops.function import map_graph
    from keras.src.ops.node import KerasHistory
    from keras.src.saving import saving_lib
    from keras.src.saving.serialization_lib import ObjectSharingScope
    from keras.src.saving.serialization_lib import SafeModeScope
    from keras.src.utils.tracking import DotNotTrackScope
except ImportError as error:
    raise ImportError(
        "keras-distilled-embedding relies on parts of Keras that this version "
        f"does not have: it is tested with keras{TESTED_KERAS}. "
        f"Received: keras {keras.__version__} ({error})"
    ) from error

__all__ = [
    "TESTED_KERAS",
    "DotNotTrackScope",
    "Functional",
    "KerasHistory",
    "ObjectSharingScope",
    "SafeModeScope",
    "get_keras_mask",
    "map_graph",
    "saving_lib",
    "set_keras_mask",
]
