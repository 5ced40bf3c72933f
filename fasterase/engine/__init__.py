"""The erasing engine: steps, gradients, optimiser, checkpoints, early stops."""
