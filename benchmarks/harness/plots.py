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


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    bars: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    styles: Mapping[str, dict] | None = None,
    level: tuple[str, float] | None = None,
    log_x: bool = False,
    rows: Sequence[str] = (),
    scatter: bool = False,
    x_format: Any = None,
    **axes_options: Any,
) -> None:
    """Draws a line for each method, and writes the picture.

    Args:
        lines: Points `(x, y)` by label. A line without points is left out.
        path: The PNG file.
        bars: By label, the lowest and the highest `y` of each point.
        styles: Options of matplotlib's `plot`, by label.
        level: A label and the height of a dashed line across the picture.
        log_x: Whether the x axis is logarithmic, in powers of two.
        rows: Names of the heights 0, 1 and so on, from the top down.
        scatter: Whether there are dots alone, without lines.
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
        style |= {"linestyle": "none"} if scatter else {}
        style |= (styles or {}).get(label, {})
        (line,) = axes.plot(x, y, label=label, **style)
        for place, (low, high) in zip(x, (bars or {}).get(label, ())):
            axes.vlines(place, low, high, color=line.get_color(), linewidth=1)
    if log_x:
        axes.set_xscale("log", base=2)
    if rows:
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
    if x_format is not None:
        axes.xaxis.set_major_formatter(x_format)
    axes.set(**axes_options)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
        )
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    write_bytes(path, file.getvalue())
