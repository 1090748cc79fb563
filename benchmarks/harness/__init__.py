"""What all figures share: rows on disk, environment, tables, plots, timing."""
