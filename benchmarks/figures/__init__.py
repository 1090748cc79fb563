"""One module a figure: `TITLE`, `run`, `collect` and `report`.

- `add_arguments(parser)`, where there are options beyond those of all figures;
- `run(rows, options)` measures what is missing, row by row;
- `collect(rows, earlier, options)` merges what is done with earlier results;
- `report(results, folder)` yields parts of the Markdown report, and writes
  pictures into the folder.
"""
