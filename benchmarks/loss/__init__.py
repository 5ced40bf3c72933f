"""Compare implementations of the contrastive loss: `python -m benchmarks.loss`."""
