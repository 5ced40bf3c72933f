"""What the benchmarks have in common as commands: options, and errors without a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.result_files import RESULTS
from fasterase.cli.main import exit_code_of, format_error
from fasterase.errors import FaseraseError

# Subgroups of the demo's emoji: recipes are tuned on some, and measured on others.
VALIDATION = ("animal-marine", "food-asian")
TEST = (
    *("food-fruit", "animal-bird", "food-sweet", "drink"),
    *("transport-air", "musical-instrument", "plant-flower", "sport"),
)


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


def mode_parser(
    description: str | None, module: str, modes: Sequence[str], file: str
) -> argparse.ArgumentParser:
    """Return a parser with a mode, --output, by default a `file` of the results, and --fresh."""
    parser = new_parser(description, prog=f"python -m {module}")
    parser.add_argument("mode", choices=modes)
    parser.add_argument("--output", type=Path, default=RESULTS / file)
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number of 1 or more.")
    return int(text)


def comparison_parser(
    description: str | None, *, work: str, seeds: int, subgroups: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Return a parser with --processes, --seeds, --work, --output and, if given, --subgroups."""
    parser = new_parser(description)
    add = parser.add_argument
    add("--processes", type=_count, default=2, help="runs at a time of one thread")
    add("--seeds", type=int, default=seeds, help="how many, from 0 on")
    add("--work", type=Path, default=Path(work), help="what is measured is kept")
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    if subgroups:
        add("--subgroups", nargs="+", default=subgroups, choices=TEST, metavar="SUBGROUP")
    return parser
