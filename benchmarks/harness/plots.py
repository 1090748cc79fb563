"""Pictures of reports, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness.files import write_bytes

_MARKERS = "osv^D<>pPXd*h"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure."""
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    write_bytes(path, file.getvalue())


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    styles: Mapping[str, dict] | None = None,
    level: tuple[str, float] | None = None,
    log_x: bool = False,
    x_format: Any = None,
    **axes_options: Any,
) -> None:
    """Draws a line for each method, and writes the picture.

    Args:
        lines: Points `(x, y)` by label. A line without points is left out.
        path: The PNG file.
        styles: Options of matplotlib's `plot`, by label.
        level: A label and the height of a dashed line across the picture.
        log_x: Whether the x axis is logarithmic, in powers of two.
        x_format: Formatter of the x axis.
        **axes_options: Options of matplotlib's `Axes.set`.
    """
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    if level is not None:
        axes.axhline(level[1], color="grey", linestyle="--", label=level[0])
    for index, (label, points) in enumerate(lines.items()):
        if not points:
            continue
        x, y = zip(*points)
        style = {"marker": _MARKERS[index % len(_MARKERS)], "linewidth": 1.2}
        style |= (styles or {}).get(label, {})
        axes.plot(x, y, label=label, **style)
    if log_x:
        axes.set_xscale("log", base=2)
    if x_format is not None:
        axes.xaxis.set_major_formatter(x_format)
    axes.set(**axes_options)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
        )
    save(figure, path)
