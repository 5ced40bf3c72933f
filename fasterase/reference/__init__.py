"""The original model's features: cached on disk, or computed in the step."""
