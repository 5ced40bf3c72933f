"""From the name of a concept to pairs to forget, to keep and to judge by: `fasterase.find`."""
