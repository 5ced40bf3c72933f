"""The erasing engine: steps, gradients, optimiser, checkpoints and what ends a run."""
