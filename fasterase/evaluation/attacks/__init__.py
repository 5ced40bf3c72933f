"""Attempts to bring a forgotten concept back: `fasterase.evaluate(..., attacks=(...))`."""
