"""The erasing engine: steps, gradients, optimiser, pacing, checks, checkpoints."""
