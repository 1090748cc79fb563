"""Factors over several devices, with `keras.distribution`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import keras

# The variables with one row a token, of `layers.DistilledEmbedding`.
_ROWS_OF_TOKENS = r"(.*/)?((reverse_)?codes(_scale)?|lora_codes_a)"


def vocabulary_layout_map(
    device_mesh: keras.distribution.DeviceMesh,
    axis: str = "model",
    tables: Sequence[str] = (),
) -> keras.distribution.LayoutMap:
    """Splits what has a row for each token over the devices of one axis.

    Of the factors, `E ~ f(U) W`, each device keeps its share of the rows of
    `U (V, r)`; `W (r, d)`, which is small, is on all of them. Neither is ever
    gathered: a look-up adds up what the devices find, and each device projects
    to its own part of the vocabulary. Everything else stays whole, unless you
    add to the map.

    Use it with `keras.distribution.ModelParallel` (on JAX), and make, load or
    compress the model under that distribution: a variable is laid out when it
    is made. `V` must be a multiple of the number of devices along the axis.

    Args:
        device_mesh: A `keras.distribution.DeviceMesh`.
        axis: Name of the axis of the mesh to split over.
        tables: Names of layers with full tables, such as the teacher's, which
            are split in the same way.

    Returns:
        A `keras.distribution.LayoutMap`, to which more can be added.

    Raises:
        TypeError: If `device_mesh` is something else.
        ValueError: If the mesh has no such axis.

    Example:

    ```python
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"))
    layout_map = vocabulary_layout_map(mesh)
    layout_map["tokens/codes"].axes  # ("model", None)
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )
    ```
    """
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise TypeError(
            "`device_mesh` must be a `keras.distribution.DeviceMesh`. "
            f"Received: device_mesh={device_mesh!r}"
        )
    if axis not in device_mesh.axis_names:
        raise ValueError(
            f"`axis` must be one of the mesh's, {device_mesh.axis_names}. "
            f"Received: axis={axis!r}"
        )
    if isinstance(tables, str):
        tables = (tables,)
    layout_map = keras.distribution.LayoutMap(device_mesh)
    layout_map[_ROWS_OF_TOKENS] = (axis, None)
    for name in tables:
        layout_map[rf"(.*/)?{re.escape(name)}/embeddings"] = (axis, None)
        layout_map[rf"(.*/)?{re.escape(name)}/reverse_embeddings"] = (
            None,
            axis,
        )
    return layout_map
