"""Forget links and keep their ends: a face and a telephone number, not the face, nor the number.

    python -m benchmarks.links [--processes 2] [--seeds 3] [--methods default ...]

A small CLIP learns the facts of made-up personas, whose faces are the demo's drawings
(personas.py): it is compromised. Erased are the telephone numbers and e-mail addresses of a quarter
of them. A clean model never saw these links, and saw everything else. Beside the method's retain
set are two sets that it is not given, as in SALMUBench (arXiv 2603.26316): the other facts of the
personas to forget (holdout_association), and the same facts of others (holdout_identity). Facts are
ranked among all of their kind (erasing.py). --work keeps models and measurements, so an interrupted
command resumes. Writes links.csv, a row per model and figure, to --output, and prints the means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.command import comparison_parser, exit_with
from benchmarks.links.erasing import ATTACKED, TRAINED, USUAL, WAYS, Cell, run
from benchmarks.links.models import CLEAN, COMPROMISED
from benchmarks.processes import call_all
from benchmarks.result_files import group_table, sum_up, write_csv
from fasterase.errors import InputError

SETS = ("forget", "holdout_association", "holdout_identity", "same number", "retain")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format means over seeds, facts and directions of trained drawings, in percent."""
    columns = {"forget: residue": ("forget", "residue")}
    for name in (*SETS, USUAL):
        columns[f"{name}: hit@1"] = name, "hit@1"
    shown = [row for row in rows if row.get("drawings", TRAINED) == TRAINED]

    def cell(those: Sequence[Mapping[str, Any]], column: str) -> str:
        name, figure = columns[column]
        return sum_up((row for row in those if row["set"] == name), figure)

    return group_table(shown, ["method"], [*columns], cell)


def attack_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format what attacks find of the links, means over seeds, in percent."""
    attacks = [row for row in rows if row["set"] == ATTACKED]

    def cell(those: Sequence[Mapping[str, Any]], figure: str) -> str:
        return sum_up((row for row in those if row["fact"] == figure), "value")

    return group_table(attacks, ["method"], [*dict.fromkeys(r["fact"] for r in attacks)], cell)


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
