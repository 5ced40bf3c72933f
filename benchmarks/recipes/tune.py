"""Compare erasures that train little with one that trains everything, on the demo's model.

    python -m benchmarks.recipes.tune [--subgroups food-fruit drink] [--seeds 2] [--processes 2]

Every `tune` erases the same subgroups with the same seeds in the default recipe, which chooses
learning rate and steps itself; measurement and subgroups are those of `benchmarks.recipes`. --work
keeps every run, so an interrupted command resumes. Writes tune.csv, a row per run, to --output.
"""

from __future__ import annotations

from benchmarks.command import comparison_parser, exit_with
from benchmarks.recipes.runs import TUNES, default_runs, execute_all, tabulate
from benchmarks.result_files import write_csv
from fasterase.files import check_writable


def main(arguments: list[str] | None = None) -> None:
    parser = comparison_parser(__doc__, work="runs/tune", seeds=1, subgroups=["food-fruit"])
    options = parser.parse_args(arguments)
    check_writable(options.work, argument="--work")
    runs = default_runs(TUNES, options.subgroups, options.seeds)
    outcome = execute_all(runs, options.work, options.processes, retrained={})
    rows = tabulate(outcome, "tune", "all")
    write_csv(options.output / "tune.csv", rows)
    for row in rows:
        shown = {key: f"{v:.3f}" if isinstance(v, float) else v for key, v in row.items()}
        print(", ".join(f"{key} {value}" for key, value in shown.items()))


if __name__ == "__main__":
    exit_with(main)
