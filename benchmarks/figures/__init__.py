"""One module a figure: `run`, `collect` and `report`.

- its docstring, in Markdown, is the title and the introduction of its report;
- `add_arguments(parser)`, where there are options beyond those of all figures;
- `run(options)` measures what is missing in `options.store`, row by row;
- `collect(options, earlier)` merges what is done with earlier results;
- `report(results, folder)` yields the other parts of the report, in Markdown,
  and writes pictures into the folder.
"""
