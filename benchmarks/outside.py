"""`python -m benchmarks.outside`: see evidence/outside.py."""

from benchmarks.command import exit_with
from benchmarks.evidence.outside import main

if __name__ == "__main__":
    exit_with(main)
