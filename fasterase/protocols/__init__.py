"""The experiments of the paper, with any model: `python -m fasterase.protocols`."""
