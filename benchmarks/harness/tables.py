"""Tables and claims of reports."""

from __future__ import annotations

import operator
from collections.abc import Sequence

_SIGNS = {"≤": operator.le, "≥": operator.ge, "<": operator.lt}


def markdown_table(rows: Sequence[dict[str, str | None]]) -> str:
    """Formats rows as a Markdown table.

    Args:
        rows: Cells by heading, the same headings in each. `None` is an empty
            cell.
    """
    headings = list(rows[0])
    cells = [[str(cell or "") for cell in row.values()] for row in rows]
    alignment = ["---"] + ["---:"] * (len(headings) - 1)
    lines = [headings, alignment, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def formatted(value: float | None, form: str) -> str:
    """Formats a number; what is not known is an empty cell."""
    return "" if value is None else form.format(value)


def claim(
    text: str, measured: float, sign: str, bar: float, form: str = "{:.5g}"
) -> dict[str, str]:
    """Returns a row that says what is claimed and whether it holds.

    Args:
        text: What is claimed.
        measured: Its number.
        sign: `"≤"`, `"≥"` or `"<"`.
        bar: The number that it is compared with.
        form: How `measured` is formatted.
    """
    return {
        "claim": text,
        "measured": form.format(measured),
        "bar": f"{sign} {bar:g}",
        "holds": "yes" if _SIGNS[sign](measured, bar) else "NO",
    }
