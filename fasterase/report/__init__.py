"""What people read: tables, plots and picture sheets. Knows nothing of models or metrics."""
