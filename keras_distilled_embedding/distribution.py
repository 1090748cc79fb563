"""Divides factors among several devices, with `keras.distribution`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import keras

# The variables of `layers.DistilledEmbedding` with one row for each token.
_TOKEN_ROWS = r"(.*/)?((reverse_)?codes|lora_codes_a)"


def vocabulary_layout_map(
    device_mesh: keras.distribution.DeviceMesh,
    axis: str = "model",
    tables: Sequence[str] = (),
) -> keras.distribution.LayoutMap:
    """Divides variables with a row for each token among devices.

    Of the factors `E ~ f(U) W + 1 c`, each device keeps its share of the rows
    of `U (V, r)`. The small `W (r, d)` and `c (d,)` are on all devices. The
    full table is never gathered: a look-up sums what the devices find, and
    each device projects to its own part of the vocabulary. All other variables
    stay whole, unless you add them to the map.

    Use the map with `keras.distribution.ModelParallel` (on JAX), and make,
    load or compress the model under that distribution, because a variable is
    laid out when it is made. `V` must be a multiple of the number of devices
    along the axis.

    Args:
        device_mesh: A `keras.distribution.DeviceMesh`.
        axis: The name of the axis of the mesh to divide over.
        tables: The names of layers with full tables, such as the teacher's,
            to divide in the same way.

    Returns:
        A `keras.distribution.LayoutMap`, to which you can add more.

    Raises:
        TypeError: If `device_mesh` is not a `DeviceMesh`.
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
            f"`axis` must be an axis of the mesh, {device_mesh.axis_names}. "
            f"Received: axis={axis!r}"
        )
    if isinstance(tables, str):
        tables = (tables,)
    layout_map = keras.distribution.LayoutMap(device_mesh)
    layout_map[_TOKEN_ROWS] = (axis, None)
    for name in tables:
        path = rf"(.*/)?{re.escape(name)}"
        layout_map[f"{path}/embeddings"] = (axis, None)
        layout_map[f"{path}/reverse_embeddings"] = (None, axis)
    return layout_map
