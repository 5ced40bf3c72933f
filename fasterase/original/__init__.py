"""The frozen original's features: the blocks on disk, who needs which rows, and the floor."""
