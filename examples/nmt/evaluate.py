"""What was gained and lost: sacreBLEU, the table, the pictures."""

from __future__ import annotations

import csv
import itertools
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path

import sacrebleu
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Result:
    """One row of the table: a file, and how it translates the test set.

    Args:
        name: What the file holds.
        bleu: sacreBLEU of greedy search.
        table_bytes: Bytes of the table in the file, all its factors.
        file_bytes: Bytes of the file.
        ms_per_sentence: Milliseconds a sentence, greedy, one at a time on one
            thread.
        beam_bleu: sacreBLEU of beam search, where it was run.
    """

    name: str
    bleu: float
    table_bytes: int
    file_bytes: int
    ms_per_sentence: float
    beam_bleu: float | None = None

    to_dict = asdict


def score(translations: list[str], references: list[str]) -> float:
    """Corpus BLEU, in points (0 to 100)."""
    metric = sacrebleu.metrics.BLEU()
    return metric.corpus_score(translations, [references]).score


def signature() -> str:
    """sacreBLEU's own account of how `score` is computed."""
    metric = sacrebleu.metrics.BLEU()
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())


def table_cells(results: list[Result]) -> list[list[str]]:
    """The table of results: its headings, then a row for each result.

    The losses of BLEU are against the first row.
    """
    rows = [["file", "BLEU", "Δ", "table", "file size", "ms/sentence"]]
    for result in results:
        rows.append(
            [
                result.name,
                f"{result.bleu:.2f}",
                f"{result.bleu - results[0].bleu:+.2f}",
                f"{result.table_bytes / 1e6:.3f} MB",
                f"{result.file_bytes / 1e6:.2f} MB",
                f"{result.ms_per_sentence:.2f}",
            ]
        )
    if any(result.beam_bleu is not None for result in results):
        beam = [result.beam_bleu for result in results]
        column = ["" if bleu is None else f"{bleu:.2f}" for bleu in beam]
        for row, cell in zip(rows, ["BLEU beam", *column]):
            row.insert(3, cell)
    return rows


def conclusion(results: list[Result]) -> str:
    """The last row beside the others, in a sentence."""
    *others, last = results
    full = others[0]
    fastest = min(other.ms_per_sentence for other in others[:2])
    return (
        f"The {last.name} file has {last.file_bytes / full.file_bytes:.0%} of "
        f"the bytes of the {full.name} one, its table "
        f"{last.table_bytes / full.table_bytes:.1%}; BLEU "
        f"{last.bleu - full.bleu:+.2f}; a sentence takes "
        f"{last.ms_per_sentence / full.ms_per_sentence:.0%} of the time, and "
        f"{last.ms_per_sentence / fastest:.0%} of that of the fastest full "
        "file."
    )


def samples(texts: dict[str, list[str]], count: int = 5) -> str:
    """The first lines of each text, one above the other.

    Args:
        texts: As many lines each, by what they are called.
        count: How many lines.
    """
    width = max(map(len, texts))
    return "\n\n".join(
        "\n".join(
            f"{name:>{width}}  {line}" for name, line in zip(texts, lines)
        )
        for lines in itertools.islice(zip(*texts.values()), count)
    )


def print_table(results: list[Result], title: str) -> None:
    """Prints the table of results."""
    headings, *rows = table_cells(results)
    table = Table(title=title, caption=f"sacreBLEU {signature()}")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    # A log has no width of its own: keep each row on one line there.
    console = Console()
    Console(width=None if console.is_terminal else 110).print(table)


def markdown_table(rows: list[list[str]]) -> str:
    """Headings and rows as a Markdown table."""
    alignment = ["---"] + ["---:"] * (len(rows[0]) - 1)
    lines = [rows[0], alignment, *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_training(histories: dict[str, Path], path: Path) -> None:
    """Draws training and validation loss by epoch, a line a model.

    Args:
        histories: CSV files of `keras.callbacks.CSVLogger`, by model name.
        path: PNG file to write.
    """
    figure, axes = _new_figure()
    for color, (name, history) in enumerate(histories.items()):
        with history.open() as lines:
            rows = list(csv.DictReader(lines))
        epochs = [int(row["epoch"]) + 1 for row in rows]
        for column, style in (("nll", "--"), ("val_nll", "-")):
            axes.plot(
                epochs,
                [float(row[column]) for row in rows],
                style,
                color=f"C{color}",
                marker="o",
                label=f"{name}, {'validation' if style == '-' else 'training'}",
            )
    axes.set(xlabel="epoch", ylabel="nats per token", title="Training")
    axes.legend()
    _save(figure, path)


def plot_quality(results: list[Result], path: Path) -> None:
    """Draws BLEU against the bytes of the files.

    An arrow leads from the first, the full one, to the last.
    """
    figure, axes = _new_figure()
    points = [(result.file_bytes / 1e6, result.bleu) for result in results]
    for index, (point, result) in enumerate(zip(points, results)):
        axes.scatter(
            *point, s=80, label=result.name, marker="osD^vP"[index % 6]
        )
    axes.annotate(
        "",
        points[-1],
        points[0],
        arrowprops=dict(arrowstyle="->", color="0.5", shrinkA=6, shrinkB=6),
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="file, MB (log scale)",
        ylabel="sacreBLEU",
        title="Quality against size",
    )
    axes.legend()
    _save(figure, path)


def _new_figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
