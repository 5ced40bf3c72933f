"""`python -m benchmarks.pairs`: see systems/pairs.py."""

from benchmarks.command import exit_with
from benchmarks.systems.pairs import main

if __name__ == "__main__":
    exit_with(main)
