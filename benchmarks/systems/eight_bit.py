"""Compare 8-bit optimiser states with 32-bit ones, in the default recipe on the demo's model.

    python -m benchmarks.systems.eight_bit [--subgroups food-fruit drink] [--seeds 2]

Every optimiser erases the same subgroups with the same seeds; measurement and subgroups are those
of `benchmarks.recipes`. What the number of bits changes is the mean of the paired differences to
AdamW, with a 95 % interval (bootstrap over pairs); what chance changes is the mean distance
between two seeds of AdamW. --work keeps every run, so an interrupted command resumes. Writes
eight_bit.csv (every run) and eight_bit.txt (the table) to --output.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from benchmarks.command import TEST, comparison_parser, exit_with
from benchmarks.recipes.runs import (
    MEASURED,
    OPTIMIZERS,
    default_runs,
    execute_all,
    interval,
    tabulate,
)
from benchmarks.result_files import count_words, write_csv
from fasterase.files import check_writable, write_text

COLUMNS = ("steps", "forget residue", "forget-unseen residue", *MEASURED)


def compare(rows: list[dict[str, Any]]) -> str:
    """Format the paired differences to AdamW, and the distance between seeds, as text."""
    by_optimizer: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in rows:
        by_optimizer.setdefault(row["optimizer"], {})[row["subgroup"], row["seed"]] = row
    baseline = by_optimizer.pop("adamw")
    lines = [
        f"{'optimizer':10} {'':26} {'adamw':>8} {'8 bits':>8} {'difference':>10} "
        f"{'95 % interval':>18} {'between seeds':>13}"
    ]
    for name, found in by_optimizer.items():
        pairs = [(baseline[run], row) for run, row in found.items() if run in baseline]
        for column in COLUMNS:
            exact = np.array([one[column] for one, _ in pairs], dtype=float)
            quantised = np.array([two[column] for _, two in pairs], dtype=float)
            low, high = interval(quantised - exact)
            span = f"{low:.3f} to {high:.3f}"
            lines.append(
                f"{name:10} {column:26} {exact.mean():8.3f} {quantised.mean():8.3f} "
                f"{(quantised - exact).mean():+10.3f} {span:>18} "
                f"{seed_distance(baseline, column):13.3f}"
            )
    for name, found in {"adamw": baseline, **by_optimizer}.items():
        for column in ("forget verdict", "forget-unseen verdict"):
            listed = count_words(row[column] for row in found.values())
            lines.append(f"{name:10} {column:26} {len(found)} runs: {listed}")
    return "\n".join(lines) + "\n"


def seed_distance(baseline: dict[tuple[str, int], dict[str, Any]], column: str) -> float:
    """Return the mean absolute difference between two seeds of a subgroup; NaN with one seed."""
    by_subgroup: dict[str, list[float]] = {}
    for (subgroup, _), row in baseline.items():
        by_subgroup.setdefault(subgroup, []).append(row[column])
    distances = [
        abs(one - two)
        for values in by_subgroup.values()
        for one, two in itertools.combinations(values, 2)
    ]
    return float(np.mean(distances)) if distances else float("nan")


def main(arguments: list[str] | None = None) -> None:
    parser = comparison_parser(__doc__, work="runs/eight_bit", seeds=2, subgroups=TEST)
    known = [each["optimizer"] for each in OPTIMIZERS.values()]
    parser.add_argument("--optimizers", nargs="+", default=known, choices=known)
    options = parser.parse_args(arguments)
    check_writable(options.work, argument="--work")
    recipes = [name for name, each in OPTIMIZERS.items() if each["optimizer"] in options.optimizers]
    runs = default_runs(recipes, options.subgroups, options.seeds)
    outcome = execute_all(runs, options.work, options.processes, retrained={})
    rows = tabulate(outcome, "optimizer", "adamw")
    text = compare(rows)
    write_csv(options.output / "eight_bit.csv", rows)
    write_text(options.output / "eight_bit.txt", text)
    print(text)


if __name__ == "__main__":
    exit_with(main)
