"""fasterase: make a CLIP model forget chosen image-text associations, fast, and prove it."""
