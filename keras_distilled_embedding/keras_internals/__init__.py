"""What takes knowledge of how Keras works inside.

Copying models with some of their layers swapped, above all. Only this folder
relies on how Keras keeps layers, graphs, masks and states; everything else
goes through these functions. `ASSUMPTIONS` lists what it relies on.
"""

from keras_distilled_embedding.keras_internals.archives import read_archive
from keras_distilled_embedding.keras_internals.archives import write_archive
from keras_distilled_embedding.keras_internals.assumptions import ASSUMPTIONS
from keras_distilled_embedding.keras_internals.assumptions import (
    check_internals,
)
from keras_distilled_embedding.keras_internals.compiling import compile_alike
from keras_distilled_embedding.keras_internals.compiling import (
    compile_arguments,
)
from keras_distilled_embedding.keras_internals.configs import configs_allowed
from keras_distilled_embedding.keras_internals.configs import (
    refuse_unrecorded_configs,
)
from keras_distilled_embedding.keras_internals.copying import copy_models
from keras_distilled_embedding.keras_internals.copying import (
    without_initial_values,
)
from keras_distilled_embedding.keras_internals.models import before_last_layer
from keras_distilled_embedding.keras_internals.models import check_copyable
from keras_distilled_embedding.keras_internals.models import check_symbolic
from keras_distilled_embedding.keras_internals.models import count_steps
from keras_distilled_embedding.keras_internals.models import find_layer
from keras_distilled_embedding.keras_internals.models import input_structure
from keras_distilled_embedding.keras_internals.models import iterate_layers
from keras_distilled_embedding.keras_internals.models import keras_mask
from keras_distilled_embedding.keras_internals.models import (
    make_variables_current,
)
from keras_distilled_embedding.keras_internals.models import named_inputs
from keras_distilled_embedding.keras_internals.models import set_mask
from keras_distilled_embedding.keras_internals.models import stop_watching
from keras_distilled_embedding.keras_internals.models import watch_calls
from keras_distilled_embedding.keras_internals.private_keras import TESTED_KERAS
from keras_distilled_embedding.keras_internals.rebuilding import LayerTree
from keras_distilled_embedding.keras_internals.rebuilding import Rebuilder
from keras_distilled_embedding.keras_internals.swapping import swap_layers

__all__ = [
    "ASSUMPTIONS",
    "TESTED_KERAS",
    "LayerTree",
    "Rebuilder",
    "before_last_layer",
    "check_copyable",
    "check_internals",
    "check_symbolic",
    "compile_alike",
    "compile_arguments",
    "configs_allowed",
    "copy_models",
    "count_steps",
    "find_layer",
    "input_structure",
    "iterate_layers",
    "keras_mask",
    "make_variables_current",
    "named_inputs",
    "read_archive",
    "refuse_unrecorded_configs",
    "set_mask",
    "stop_watching",
    "swap_layers",
    "watch_calls",
    "without_initial_values",
    "write_archive",
]
