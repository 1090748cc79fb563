"""What compression costs, measured: `python -m benchmarks`, see README.md."""
