"""Image-text pairs: open any input and load it in seeded batches of pixels and tokens."""
