"""Run a benchmark as a command: what is wrong with its input is one line, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from fasterase.cli.main import exit_code_of, format_error
from fasterase.errors import FaseraseError


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Call `main`, and exit with the code that it returns.

    An error of fasterase is one line on stderr and has the exit code that the command `fasterase`
    gives it: 2 for wrong input. Any other is a fault of the benchmark, and keeps its traceback.
    """
    try:
        code = main()
    except FaseraseError as error:
        print(f"error: {format_error(error)}", file=sys.stderr)
        code = exit_code_of(error)
    sys.exit(code)
