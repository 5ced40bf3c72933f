"""Make what the demo ships with: the shards of drawings and the small CLIP models."""
