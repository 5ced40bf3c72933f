"""`python -m fasterase`: the command line."""

import sys

from fasterase.cli import main

if __name__ == "__main__":
    sys.exit(main())
