"""What all figures share: rows on disk, environment, tables, plots, timing."""

from benchmarks.harness.environment import environments
from benchmarks.harness.files import RESULTS
from benchmarks.harness.files import read_results
from benchmarks.harness.files import write_json
from benchmarks.harness.files import write_text
from benchmarks.harness.measure import Times
from benchmarks.harness.measure import give_freed_memory_back
from benchmarks.harness.measure import in_new_process
from benchmarks.harness.measure import peak_mb
from benchmarks.harness.measure import reset_peak
from benchmarks.harness.measure import resident_mb
from benchmarks.harness.measure import time_in_turns
from benchmarks.harness.plots import plot_lines
from benchmarks.harness.rows import Rows
from benchmarks.harness.rows import merged
from benchmarks.harness.tables import claim
from benchmarks.harness.tables import formatted
from benchmarks.harness.tables import markdown_table

__all__ = [
    "RESULTS",
    "Rows",
    "Times",
    "claim",
    "environments",
    "formatted",
    "give_freed_memory_back",
    "in_new_process",
    "markdown_table",
    "merged",
    "peak_mb",
    "plot_lines",
    "read_results",
    "reset_peak",
    "resident_mb",
    "time_in_turns",
    "write_json",
    "write_text",
]
