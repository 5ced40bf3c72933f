"""The original model's features: encoded once and cached on disk, or computed in each step."""
