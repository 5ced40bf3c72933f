"""Hold the cost model against times that the sweep of the loss measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.command import exit_with
from benchmarks.loss.gpu_model.measured import compare, summarise
from benchmarks.result_files import write_csv


def main(argv: list[str] | None = None) -> None:
    """Print the comparison, and write it to --output."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss.gpu_model", description=__doc__
    )
    parser.add_argument(
        "--against",
        type=Path,
        required=True,
        metavar="FILE",
        help="CSV of python -m benchmarks.loss --device cuda",
    )
    parser.add_argument(
        "--output", type=Path, help="CSV to write; default: FILE's name with _model, beside it"
    )
    args = parser.parse_args(argv)
    found = compare(args.against)
    output = args.output or args.against.with_name(f"{args.against.stem}_model.csv")
    write_csv(output, found, decimals=5)
    print(summarise(found))


if __name__ == "__main__":
    exit_with(main)
