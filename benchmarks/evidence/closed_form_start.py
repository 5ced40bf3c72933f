"""Does a closed-form eraser at the start make an erasure shorter?

    python -m benchmarks.evidence.closed_form_start [--subgroups food-fruit drink] [--seed 0]

A concept is erased from the demo's model, from four starts: none; the default, which takes the
meaning from words that only the concept needs; and the null-space projection of the concept's
text features (after arXiv 2512.14137) with two settings. The projection is folded into both towers
after the first step, so that floor, reference and damage are those of the original. A start is
worth its place if the run needs fewer steps at equal damage. Writes closed_form_start.csv, a row
per run, to --output; runs that it holds already are not repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.command import TEST, exit_with, new_parser
from benchmarks.evidence.closed_form import project_texts_out
from benchmarks.evidence.task import Task, train
from benchmarks.recipes.runs import KEEP_SETS
from benchmarks.result_files import RESULTS, read_csv, write_csv
from fasterase.demo import emoji
from fasterase.demo.run import evaluate_sets, recipe_config, trained_pairs
from fasterase.demo.sets import build_sets
from fasterase.models.load import load_model

WORDS = "words without meaning"
# What is projected out after the first step; None: nothing.
STARTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    WORDS: None,
    "rank 2, centred": {"rank": 2, "centred": True},
    "rank 8, centred": {"rank": 8, "centred": True},
}


def measure(subgroup: str, start: str, seed: int) -> dict[str, Any]:
    """Carry out one run; return its row."""
    base = str(emoji.BASE_MODEL)
    sets = build_sets(subgroup, original=base, seed=seed)
    model = load_model(base)
    setting = STARTS[start]

    def project(_: int) -> None:
        if setting is not None:
            project_texts_out(Task(model, sets, seed, measure=lambda _: None), setting)

    forget, retain = trained_pairs(sets, "fasterase")
    steps = train(
        Task(model, sets, seed, measure=project),
        recipe_config("fasterase", small_model=True, forget_words=start == WORDS),
        forget=forget,
        retain=retain,
        measured_at=[1],
    )
    evaluation = evaluate_sets(model, sets, original=base, progress=False)
    assert evaluation.original is not None
    recall = "image_to_text_recall@1"
    row: dict[str, Any] = {"start": start, "subgroup": subgroup, "seed": seed, "steps": steps}
    for name, verdict in evaluation.set_verdicts["model"].items():
        row[f"{name} verdict"] = verdict
        row[f"{name} residue"] = evaluation.mean_residue(name)
    for name in KEEP_SETS:
        change = evaluation.scores[name][recall] - evaluation.original[name][recall]
        row[f"{name} recall@1 change"] = change
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--subgroups", nargs="+", default=["food-fruit"], choices=TEST, metavar="SUBGROUP"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    file = options.output / "closed_form_start.csv"
    rows: list[dict[str, Any]] = [*read_csv(file)]
    known = {(row["subgroup"], row["start"], str(row["seed"])) for row in rows}
    runs = [(subgroup, start) for subgroup in options.subgroups for start in STARTS]
    for subgroup, start in tqdm(runs, unit="run", disable=None):
        if (subgroup, start, str(options.seed)) not in known:
            rows.append(measure(subgroup, start, options.seed))
            write_csv(file, rows)
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)


if __name__ == "__main__":
    exit_with(main)
