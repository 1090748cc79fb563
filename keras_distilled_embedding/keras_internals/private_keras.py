"""The parts of Keras that are not public, and the version they are tested in.

`tests/test_keras_internals.py` checks, one by one, what this package relies on.
"""

from __future__ import annotations

import keras

try:
    from keras.src.backend import StatelessScope as StatelessScope
    from keras.src.backend import compute_output_spec as compute_output_spec
    from keras.src.backend import get_keras_mask as get_keras_mask
    from keras.src.backend.common import global_state as global_state
    from keras.src.backend.common.masking import (
        set_keras_mask as set_keras_mask,
    )
    from keras.src.models.functional import Functional as Functional
    from keras.src.ops.function import map_graph as map_graph
    from keras.src.ops.node import KerasHistory as KerasHistory
    from keras.src.saving import object_registration as object_registration
    from keras.src.saving import saving_lib as saving_lib
    from keras.src.saving import serialization_lib as serialization_lib
    from keras.src.saving.serialization_lib import (
        ObjectSharingScope as ObjectSharingScope,
    )
    from keras.src.saving.serialization_lib import (
        SafeModeScope as SafeModeScope,
    )
    from keras.src.utils import python_utils as python_utils
    from keras.src.utils.tracking import DotNotTrackScope as DotNotTrackScope
except ImportError as error:
    raise ImportError(
        "keras-distilled-embedding uses private parts of Keras that this "
        "version does not have. It is tested with Keras 3.15. "
        f"Received: Keras {keras.__version__} ({error})"
    ) from error
