"""Show what the demo did: a short summary, and a sheet of pictures with their captions."""

from __future__ import annotations

from pathlib import Path

from fasterase.demo.sets import DemoSets, Drawings
from fasterase.encode import PairEncoder
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs
from fasterase.report.evaluation import Evaluation
from fasterase.report.pictures import CaptionRanking, picture_sheet, spread

PICTURES = 12

# What the summary calls each recipe.
RECIPE_TITLES = {"fasterase": "fasterase", "cliperase": "paper's recipe"}

# Set, metric and meaning of each line of the summary.
_FORGET, _KEEP = "concept_hit@1", "image_to_text_recall@1"
_SUMMARY = (
    ("forget", _FORGET, "forget: still named (by chance: {chance})"),
    ("forget-unseen", _FORGET, "forget-unseen: other drawings of them"),
    ("neighbour", _KEEP, "neighbour: similar, named correctly"),
    ("retain", _KEEP, "retain: all others, named correctly"),
    ("holdout", _KEEP, "holdout: not in the run, named correctly"),
)


def summary(evaluation: Evaluation, recipe: str) -> str:
    """Return six lines: the share of pictures that each model names, by set.

    On sets to forget, a picture counts as named if the closest of all names is any name of the
    erased concept; on the other sets, if it is the picture's own name. `recipe` made the model.
    """
    models = {
        "original": evaluation.original or {},
        RECIPE_TITLES[recipe]: evaluation.scores,
        **{_title(name): scores for name, scores in evaluation.references.items()},
    }
    lines = [["share of pictures", *models]]
    for name, metric, text in _SUMMARY:
        chance = _percent(evaluation.chance.get(name, {}).get(metric))
        values = [_percent(scores.get(name, {}).get(metric)) for scores in models.values()]
        lines.append([text.format(chance=chance), *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    label_width, *others = widths
    return "\n".join(
        "  ".join([f"{label:<{label_width}}", *map(str.rjust, cells, others)])
        for label, *cells in lines
    )


def print_result(evaluation: Evaluation, folder: Path, *, recipe: str, full: bool) -> None:
    """Print the summary, the full table if wanted, and what the output folder contains."""
    print(f"\n{summary(evaluation, recipe)}\n")
    verdicts = {"model": RECIPE_TITLES[recipe], **{n: _title(n) for n in evaluation.references}}
    for name, title in verdicts.items():
        scores = None if name == "model" else evaluation.references[name]
        listed = ", ".join(
            f"{each} {verdict} (residue {evaluation.mean_residue(each, scores):.2f})"
            for each, verdict in evaluation.set_verdicts.get(name, {}).items()
        )
        if listed:
            print(f"Verdict on {title}: {listed}.")
    print("Residue: 1 is known, 0.5 no trace, 0 loudly absent.")
    if full:
        print(f"\n{evaluation.table()}\n")
    hint = "" if full else " (--full prints it)"
    print(f"Every metric, with 95 % intervals: {folder / 'evaluation.txt'}{hint}.")
    print(
        f"Also in {folder}:\n  model/ (the erased model), pictures.png (captions before and "
        "after), losses.png,\n  report.md, evaluation.json, history.jsonl."
    )
    print("The pairs are emoji: real image-text pairs, but no evidence about photographs.")


def draw_sheet(sets: DemoSets, original: str, erased: Path, path: Path) -> None:
    """Write the sheet of `PICTURES` drawings each of forget, neighbour and retain to `path`."""
    ranking = rank_names(sets, original, erased)
    sections = {"forget": sets.forget, "neighbour": sets.neighbour, "retain": sets.retain}
    rows = [
        row
        for section, pairs in sections.items()
        for row in ranking.rows(section, open_pairs(pairs, name=section), _spread(pairs))
    ]
    picture_sheet(rows, path, erased=sets.concepts)


def rank_names(sets: DemoSets, original: str, erased: Path) -> CaptionRanking:
    """Let the names of all concepts of the run compete for the drawings."""
    names = {name for pairs in (sets.forget, sets.retain, sets.holdout) for name in pairs.names}
    return CaptionRanking(
        sorted(names), PairEncoder(load_model(original)), PairEncoder(load_model(erased))
    )


def _title(reference: str) -> str:
    """Name a reference in the summary: `cliperase recipe` as its title, others as they are."""
    return RECIPE_TITLES.get(reference.removesuffix(" recipe"), reference)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _spread(pairs: Drawings) -> list[int]:
    """Choose `PICTURES` drawings spread evenly over the set, of different concepts if possible."""
    first_of = {name: row for row, name in reversed(list(enumerate(pairs.names)))}
    return spread(sorted(first_of.values()), PICTURES)
