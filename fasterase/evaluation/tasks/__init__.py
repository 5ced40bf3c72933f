"""What models are used for: `fasterase.evaluate(..., tasks=(...))`."""
