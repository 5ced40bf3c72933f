"""Ways to make the demo's model forget, each tuned in the same way, side by side."""
