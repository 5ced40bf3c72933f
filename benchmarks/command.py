"""What the benchmarks have in common as commands: options, and errors without a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.result_files import RESULTS
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


def new_parser(description: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return a parser whose help shows a module's docstring as it is written."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=layout, **options)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number of 1 or more.")
    return int(text)


def comparison_parser(description: str | None, *, work: str) -> argparse.ArgumentParser:
    """Return a parser with --processes, --output and --work, by default the folder `work`."""
    parser = new_parser(description)
    parser.add_argument("--processes", type=_count, default=2, help="runs at a time of one thread")
    parser.add_argument("--work", type=Path, default=Path(work), help="what is measured is kept")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser
