"""Output for people: tables, plots and picture sheets. Independent of models and metrics."""
