"""Image-text pairs: from what users have to seeded batches of pixels and tokens."""
