"""Forget links and keep their ends: a face and a telephone number, not the face, nor the number.

    python -m benchmarks.links [--processes 2] [--seeds 3] [--methods default ...]

A small CLIP learns the facts of made-up personas, whose faces are the demo's drawings
(personas.py): it is compromised. Erased are the telephone numbers and e-mail addresses of a quarter
of them. A clean model never saw these links, and saw everything else. Beside the method's retain
set are two sets that it is not given, as in SALMUBench (arXiv 2603.26316): the other facts of the
personas to forget (holdout_association), and the same facts of others (holdout_identity). Facts are
ranked among all of their kind (measure.py). --work keeps models and measurements, so an interrupted
command resumes. Writes links.csv, a row per model and figure, to --output, and prints the means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.command import comparison_parser, exit_with
from benchmarks.links.erasing import ATTACKED, TRAINED, USUAL, WAYS, Cell, run
from benchmarks.links.models import CLEAN, COMPROMISED
from benchmarks.processes import call_all
from benchmarks.result_files import markdown_table, write_csv
from fasterase.errors import InputError


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format means over seeds, facts and directions of trained drawings, in percent."""
    columns = [
        *((name, "residue") for name in ("forget",)),
        *((name, "hit@1") for name in ("forget", "holdout_association", "holdout_identity")),
        *((name, "hit@1") for name in ("same number", "retain", USUAL)),
    ]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [method]
        for name, figure in columns:
            values = [
                row[figure]
                for row in rows
                if (row["method"], row["set"]) == (method, name)
                and row.get("drawings", TRAINED) == TRAINED
            ]
            cells.append(f"{100 * np.mean(values):.1f}")
        lines.append(cells)
    return markdown_table(["", *(f"{name}: {figure}" for name, figure in columns)], lines)


def attack_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format what attacks find of the links, means over seeds, in percent."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["set"] == ATTACKED:
            found.setdefault((row["method"], row["fact"]), []).append(row["value"])
    methods, figures = (list(dict.fromkeys(key)) for key in zip(*found, strict=True))
    lines = [
        [m, *(f"{100 * np.mean(found[m, figure]):.1f}" for figure in figures)] for m in methods
    ]
    return markdown_table(["", *figures], lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = comparison_parser(__doc__, work="runs/links", seeds=3)
    parser.add_argument("--methods", nargs="+", default=list(WAYS), metavar="TITLE")
    options = parser.parse_args(argv)
    unknown = [title for title in options.methods if title not in WAYS]
    if unknown:
        raise InputError(f"--methods: {unknown[0]!r} is none of {', '.join(WAYS)}.")
    trained = [Cell(name, seed) for seed in range(options.seeds) for name in (COMPROMISED, CLEAN)]
    erased = [Cell(title, seed) for seed in range(options.seeds) for title in options.methods]
    rows = []
    for cells in (trained, erased):  # the second ones start from the models of the first
        found = call_all(run, cells, options.work, processes=options.processes, describe=str)
        rows += [row for cell in cells for row in found[cell]]
    write_csv(options.output / "links.csv", rows, decimals=4)
    print(f"{table(rows)}\n\n{attack_table(rows)}")


if __name__ == "__main__":
    exit_with(main)
