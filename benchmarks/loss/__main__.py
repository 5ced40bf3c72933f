"""Run the sweep."""

from benchmarks.command import exit_with
from benchmarks.loss.sweep import main

if __name__ == "__main__":
    exit_with(main)
