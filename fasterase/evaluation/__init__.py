"""How much a model knows of the pairs to forget, and what else was damaged."""
