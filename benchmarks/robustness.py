"""`python -m benchmarks.robustness`: see evidence/robustness.py."""

from benchmarks.command import exit_with
from benchmarks.evidence.robustness import main

if __name__ == "__main__":
    exit_with(main)
