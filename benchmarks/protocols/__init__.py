"""The experiments of the paper, with any model: `python -m benchmarks.protocols`."""
