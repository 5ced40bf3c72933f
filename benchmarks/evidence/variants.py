"""Would another recipe be better? Variants of the default, where damage shows.

    python -m benchmarks.evidence.variants [--processes 2] [--seeds 3] [--concepts SUBGROUP ...]

The variants (varied.py) are ideas for less damage, for deeper forgetting, or for a
concept that relearning does not bring back so soon. Those that looked best have several seeds, the
others one; `--titles` chooses among them. They erase subgroups with many near neighbours, never
those that the other tables report. Each run is kept in --work as soon as it is measured, so an
interrupted command resumes. Writes variants.csv to --output, a row per variant, and prints the
table.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.command import CROWDED, VALIDATION, comparison_parser, exit_with
from benchmarks.evidence.attacks import attacks_of
from benchmarks.evidence.cells import ORIGINAL, VARIANTS, Cell, as_text, run_cells
from benchmarks.evidence.table import ATTACKED, as_table, by_place, summarise
from benchmarks.result_files import write_csv


def main(argv: Sequence[str] | None = None) -> None:
    parser = comparison_parser(__doc__, work="runs/variants", seeds=3)
    known = sorted({*CROWDED, *VALIDATION})
    parser.add_argument("--concepts", nargs="+", default=CROWDED, choices=known, metavar="SUBGROUP")
    parser.add_argument("--titles", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    options = parser.parse_args(argv)
    seeds = range(options.seeds)
    cells = [Cell(ORIGINAL, "{}", place, seed) for place in options.concepts for seed in seeds]
    cells += [
        Cell(title, as_text(VARIANTS[title].settings[0]), place, seed, attacks_of(ATTACKED))
        for title in options.titles
        for place in options.concepts
        for seed in seeds[: VARIANTS[title].most_seeds]
    ]
    found = run_cells(cells, options.work, options.processes)
    order = [ORIGINAL, *VARIANTS]
    found.sort(key=lambda each: (order.index(each.method), each.subgroup, each.seed))
    rows = summarise(found, by_place(found))
    write_csv(options.output / "variants.csv", rows)
    print(as_table(rows))


if __name__ == "__main__":
    exit_with(main)
