"""Training in several processes: who takes part, and the engines that keep their weights alike."""
