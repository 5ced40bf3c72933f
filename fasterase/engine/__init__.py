"""The erasing engine: steps, gradients, optimiser, checkpoints and guards."""
