"""The only package that relies on private parts of Keras.

It copies models with some of their layers replaced, writes and reads files of
such models, and answers questions about layers, inputs, masks and calls.
"""

from keras_distilled_embedding.keras_internals.compiling import compile_alike
from keras_distilled_embedding.keras_internals.compiling import (
    compile_arguments,
)
from keras_distilled_embedding.keras_internals.compiling import (
    exclude_from_weight_decay,
)
from keras_distilled_embedding.keras_internals.compiling import (
    weight_decay_exclusions,
)
from keras_distilled_embedding.keras_internals.compiling import (
    without_compiling,
)
from keras_distilled_embedding.keras_internals.copying import copy_models
from keras_distilled_embedding.keras_internals.copying import refuse_reads
from keras_distilled_embedding.keras_internals.layer_tree import LayerTree
from keras_distilled_embedding.keras_internals.layer_tree import Rebuilder
from keras_distilled_embedding.keras_internals.models import before_last_layer
from keras_distilled_embedding.keras_internals.models import check_symbolic
from keras_distilled_embedding.keras_internals.models import find_layer
from keras_distilled_embedding.keras_internals.models import input_structure
from keras_distilled_embedding.keras_internals.models import iterate_layers
from keras_distilled_embedding.keras_internals.models import last_activations
from keras_distilled_embedding.keras_internals.models import (
    make_variables_current,
)
from keras_distilled_embedding.keras_internals.models import stop_watching
from keras_distilled_embedding.keras_internals.models import watch_calls
from keras_distilled_embedding.keras_internals.private_keras import (
    get_keras_mask as keras_mask,
)
from keras_distilled_embedding.keras_internals.private_keras import (
    set_keras_mask as set_mask,
)
from keras_distilled_embedding.keras_internals.scopes import (
    without_initial_values,
)
from keras_distilled_embedding.keras_internals.serialization import read_archive
from keras_distilled_embedding.keras_internals.serialization import (
    refuse_incomplete_configs,
)
from keras_distilled_embedding.keras_internals.serialization import (
    write_archive,
)

__all__ = [
    "LayerTree",
    "Rebuilder",
    "before_last_layer",
    "check_symbolic",
    "compile_alike",
    "compile_arguments",
    "copy_models",
    "exclude_from_weight_decay",
    "find_layer",
    "input_structure",
    "iterate_layers",
    "keras_mask",
    "last_activations",
    "make_variables_current",
    "read_archive",
    "refuse_incomplete_configs",
    "refuse_reads",
    "set_mask",
    "stop_watching",
    "watch_calls",
    "weight_decay_exclusions",
    "without_compiling",
    "without_initial_values",
    "write_archive",
]
