"""Put erased models of the demo beside models that were trained without the concept.

    python -m benchmarks.evidence.references --references FOLDER [--seeds 3] [--processes 2]

FOLDER holds models that `python -m tools.demo_assets.train --without CONCEPT --output
FOLDER/without-CONCEPT` made; the one without food-fruit ships with the package. Of each concept the
demo's model ("original"), the one trained without it ("retrained") and the one from which the
default recipe erased it ("erased") are judged, attacked and measured on what is kept. A seed is one
of the erasure, and also chooses what is held out. --work keeps models and measurements, so an
interrupted command resumes. Writes references.csv, a row per seed, concept, model and figure, to
--output, and prints the table and how far the erased model is from the retrained one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.command import comparison_parser, exit_with
from benchmarks.evidence.attacks import MEMBERSHIP, RELEARNED, SWAPPED, attacks_of, non_members
from benchmarks.evidence.sequential import HIT, erase
from benchmarks.evidence.task import KEEP_SETS, RECALL, keep_evaluation
from benchmarks.processes import call_all
from benchmarks.result_files import group_rows, group_table, sum_up, write_csv
from fasterase.demo import emoji
from fasterase.demo.run import evaluate_sets
from fasterase.demo.sets import build_sets
from fasterase.errors import InputError
from fasterase.provenance import read_record
from fasterase.report.evaluation import Evaluation

PREFIX = "without-"
ORIGINAL, RETRAINED, ERASED = MODELS = ("original", "retrained", "erased")
VERDICT = "verdict"
FORGET_SETS = {"forget": "", "forget-unseen": "unseen "}
ATTACKED = (*SWAPPED, *RELEARNED, *MEMBERSHIP)


def find_references(folder: Path | None) -> dict[str, Path]:
    """Return concept -> model trained without it: the packaged one and those in `folder`."""
    found = {emoji.DEFAULT_FORGET: emoji.RETRAINED_MODEL}
    if folder is not None:
        trained = sorted(file.parent for file in folder.glob(f"{PREFIX}*/training.json"))
        if not trained:
            raise InputError(
                f"--references: no folder {folder}/{PREFIX}CONCEPT holds a finished model. Make "
                "one with python -m tools.demo_assets.train --without CONCEPT."
            )
        found |= {path.name.removeprefix(PREFIX): path for path in trained}
    return found


def run(cell: tuple[int, str], references: Mapping[str, Path], work: Path) -> Evaluation:
    """Erase a concept and measure the three models, or read what an earlier command measured."""
    seed, concept = cell
    folder = work / f"{concept}_seed{seed}"

    def measure() -> Evaluation:
        base = str(emoji.BASE_MODEL)
        sets = build_sets(concept, original=base, seed=seed)
        if read_record(folder / "model") is None:
            erase(base, sets.forget, sets.retain, seed=seed, folder=folder / "model")
        return evaluate_sets(
            str(folder / "model"),
            sets,
            original=base,
            references={RETRAINED: str(references[concept])},
            attacks=attacks_of(ATTACKED),
            non_members=non_members(),
            seed=seed,
            progress=False,
        )

    return keep_evaluation(folder / "evaluation.json", measure)


def rows_of(concept: str, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Yield a row per model and figure: shares from 0 to 1, and the verdict on each model."""
    original, references = evaluation.original, evaluation.references
    assert original is not None
    scores = {ORIGINAL: original, RETRAINED: references[RETRAINED], ERASED: evaluation.scores}
    verdicts = {**evaluation.set_verdicts, ERASED: evaluation.set_verdicts["model"]}
    for model in MODELS:
        figures: dict[str, Any] = {}
        for name, prefix in FORGET_SETS.items():
            figures[f"{prefix}hit@1"] = scores[model][name][HIT]
            figures[f"{prefix}residue"] = evaluation.mean_residue(name, scores[model])
            figures[f"{prefix}{VERDICT}"] = verdicts[model][name]
        for name in KEEP_SETS:
            figures[f"{name} change"] = scores[model][name][RECALL] - original[name][RECALL]
        here = {"concept": concept, "model": model}
        for figure, value in figures.items():
            yield {**here, "figure": figure, "value": value}
        for each in ATTACKED:
            finding = evaluation.attacks[each.attack][each.key]
            value, low, high = finding.by_model()["model" if model == ERASED else model]
            found = {"value": value, "low": low, "high": high, "chance": finding.chance}
            yield {**here, "figure": each.title, **found}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format means over seeds as Markdown, in percent, and over concepts where there are two."""
    concepts = {row["concept"] for row in rows}
    means = [{**row, "concept": "mean"} for row in rows] if len(concepts) > 1 else []

    def cell(those: Sequence[Mapping[str, Any]], figure: str) -> str:
        form = "+.1f" if figure.endswith("change") else ".1f"
        return sum_up((row for row in those if row["figure"] == figure), "value", form)

    figures = list(dict.fromkeys(row["figure"] for row in rows))
    return group_table([*rows, *means], ["concept", "model"], figures, cell)


def distances(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say for each figure how far the erased models are from the retrained ones, in points."""
    lines = ["erased minus retrained, in points: mean over concepts (each concept)"]
    for (figure,), those in group_rows(rows, "figure").items():
        if figure.endswith(VERDICT):
            continue
        apart = []
        for of_concept in group_rows(those, "concept").values():
            of_model = group_rows(of_concept, "model")
            erased, retrained = (
                fmean(row["value"] for row in of_model[model,]) for model in (ERASED, RETRAINED)
            )
            apart.append(100 * (erased - retrained))
        listed = ", ".join(f"{value:+.1f}" for value in apart)
        lines.append(f"{figure:36} {fmean(apart):+6.1f} ({listed})")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = comparison_parser(__doc__, work="runs/references", seeds=3)
    parser.add_argument("--references", type=Path, metavar="FOLDER", help="the folder above")
    options = parser.parse_args(arguments)
    references = find_references(options.references)
    cells = [(seed, concept) for seed in range(options.seeds) for concept in references]
    found = call_all(run, cells, references, options.work, processes=options.processes)
    rows = [
        {"seed": seed, **row}
        for seed, concept in cells
        for row in rows_of(concept, found[seed, concept])
    ]
    write_csv(options.output / "references.csv", rows)
    print(f"\n{table(rows)}\n{distances(rows)}")


if __name__ == "__main__":
    exit_with(main)
