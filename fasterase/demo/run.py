"""Run the demo: erase one concept through the public `unlearn`, and show what changed.

Its pairs are drawings of emoji with their names. They prove that the machinery works on real
image-text pairs; they say nothing about photographs.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import fasterase
from fasterase.config import UnlearnConfig
from fasterase.demo import emoji
from fasterase.demo.sets import DemoSets, Drawings, build_sets
from fasterase.encode import PairEncoder
from fasterase.errors import InputError, import_extra
from fasterase.files import write_text
from fasterase.models.load import load_model
from fasterase.numerals import counted
from fasterase.page import PAGE, REST, read_run, write_reports, write_rest
from fasterase.pairs.open import open_pairs
from fasterase.progress import launched_rank
from fasterase.report.evaluation import Evaluation
from fasterase.report.pictures import CaptionRanking, picture_sheet, spread
from fasterase.report.plots import history_charts, plot_charts
from fasterase.report.tables import align
from fasterase.report.templating import render

# What the summary calls each recipe.
RECIPES = {"fasterase": "fasterase", "cliperase": "paper's recipe"}
# The paper's recipe has numbers to choose: of those tried on Asian food and marine animals, with 60
# steps and with 100, these did best. Ours has none: the demo gives it batches for a small set.
CLIPERASE = {"lr": 1e-4, "consistency_weight": 9.0, "max_steps": 60}
BATCHES = {"batch_size": 128, "forget_batch_size": 32}
PICTURES = 12  # of each set on the sheet

# Set, metric and meaning of each line of the summary.
_FORGET, _KEEP = "concept_hit@1", "image_to_text_recall@1"
_SUMMARY = (
    ("forget", _FORGET, "forget: still named (by chance: {chance})"),
    ("forget-unseen", _FORGET, "forget-unseen: other drawings of them"),
    ("neighbour", _KEEP, "neighbour: similar, named correctly"),
    ("retain", _KEEP, "retain: all others, named correctly"),
    ("holdout", _KEEP, "holdout: not in the run, named correctly"),
)


def recipe_config(recipe: str, *, small_model: bool, **fields: Any) -> UnlearnConfig:
    """Return the config of a recipe, "fasterase" or "cliperase" (the paper's); `fields` win.

    For the small model it has batches for a small set, and the paper's recipe its tuned values.

    Raises:
        InputError: `recipe` is not known, or `fields` are not fields of `UnlearnConfig`.
    """
    if recipe not in RECIPES:
        raise InputError(f"recipe={recipe!r} is not one of {', '.join(RECIPES)}.")
    tuned = {**BATCHES, **(CLIPERASE if recipe == "cliperase" else {})}
    base = UnlearnConfig() if recipe == "fasterase" else UnlearnConfig.cliperase()
    return base.replace(**{**(tuned if small_model else {}), "evaluation": None, **fields})


def trained_pairs(sets: DemoSets, recipe: str) -> tuple[Drawings, Drawings]:
    """Return what to forget and to retain: names for the paper's recipe, for ours all wordings.

    Wordings of retain tell which words of the concept others need too.
    """
    wording = emoji.captions if recipe == "fasterase" else emoji.name_only
    return sets.forget.reworded(wording), sets.retain.reworded(wording)


def evaluate_sets(model: Any, sets: DemoSets, **fields: Any) -> Evaluation:
    """Measure a model on all sets of an erasure; `fields` are those of `fasterase.evaluate`."""
    return fasterase.evaluate(
        model,
        sets.forget,
        sets.retain,
        holdout=sets.holdout,
        sets={"neighbour": sets.neighbour},
        forget_sets={"forget-unseen": sets.unseen},
        **fields,
    )


def run_demo(
    *,
    forget: str = emoji.DEFAULT_FORGET,
    model: str | None = None,
    recipe: str = "fasterase",
    output_dir: str | None = None,
    full: bool = False,
    **fields: Any,
) -> Evaluation | None:
    """Erase the concept `forget` from a small CLIP (or from `model`), and print before and after.

    The arguments are the flags of `fasterase demo`; `fields` are further fields of `UnlearnConfig`.
    The other recipe runs for comparison. The folder gets the whole evaluation, the erased model,
    the history, a loss plot and a sheet of pictures with captions before and after.

    Returns:
        The evaluation; None on all but the first of several processes, which erase together.

    Raises:
        InputError: an argument is not usable.
        MissingExtraError: matplotlib or transformers is not installed (extra `demo`).
    """
    for module in ("matplotlib.figure", "transformers"):  # now, not after minutes of erasing
        import_extra(module, "demo,eval", "The demo")
    original = str(emoji.BASE_MODEL) if model is None else model
    folder = Path(
        os.path.expanduser(output_dir or "") or "runs/demo-" + re.sub(r"[^\w-]+", "_", forget)
    )
    configs = {
        name: recipe_config(name, small_model=model is None, **fields)
        for name in dict.fromkeys((recipe, *RECIPES))
    }
    sets = build_sets(forget, original=original, seed=configs[recipe].seed)
    shown = ", ".join(sets.concepts[:6]) + (", ..." if len(sets.concepts) > 6 else "")
    named = f"{counted(len(sets.concepts), 'concept')} ({shown})"
    print(f"Erasing {named}. Results go to {folder}.")
    results = {}
    for name, config in configs.items():
        place = folder if name == recipe else folder / name
        config = config.replace(output_dir=str(place), reference_cache=str(folder / "reference"))
        with _comparison(name) if name != recipe else nullcontext():
            results[name] = fasterase.unlearn(original, *trained_pairs(sets, name), config=config)
    if launched_rank() != 0:
        return None
    references = {
        f"{name} recipe": str(folder / name / "model") for name in configs if name != recipe
    }
    if model is None and forget == emoji.DEFAULT_FORGET:
        references["retrained without it"] = str(emoji.RETRAINED_MODEL)
    evaluation = evaluate_sets(
        str(folder / "model"),
        sets,
        original=original,
        references=references,
        num_workers=configs[recipe].num_workers,
        progress=configs[recipe].progress,
    )
    evaluation.to_json(folder / "evaluation.json")
    write_text(folder / "evaluation.txt", evaluation.table() + "\n")
    # No charts where the model never knew the concept.
    if charts := history_charts(results[recipe].history):
        plot_charts(charts, folder / "losses.png")
    draw_sheet(sets, original, folder / "model", folder / "pictures.png")
    if (folder / REST).is_file():
        called = "fruit" if forget == emoji.DEFAULT_FORGET else emoji.class_name(forget)
        run = replace(read_run(folder), called=called)
        write_rest(run, folder)
        write_reports(run, folder)
    print_result(evaluation, folder, recipe=recipe, full=full)
    return evaluation


@contextmanager
def _comparison(recipe: str) -> Iterator[None]:
    """Announce the run of the other recipe, and put its name before the warnings of the run."""
    title = RECIPES[recipe]
    print(f"For comparison: {title}.")
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        for warning in caught:
            text = f"{title} (comparison): {warning.message}"
            warnings.warn(text, warning.category, stacklevel=2)


def summary(evaluation: Evaluation, recipe: str) -> str:
    """Return six lines: the share of pictures that each model names, by set.

    On sets to forget, a picture counts as named if the closest of all names is any name of the
    erased concept; on the other sets, if it is the picture's own name. `recipe` made the model.
    """
    models = {
        "original": evaluation.original or {},
        RECIPES[recipe]: evaluation.scores,
        **{_title(name): scores for name, scores in evaluation.references.items()},
    }
    lines = [["share of pictures", *models]]
    for name, metric, text in _SUMMARY:
        chance = _percent(evaluation.chance.get(name, {}).get(metric))
        values = [_percent(scores.get(name, {}).get(metric)) for scores in models.values()]
        lines.append([text.format(chance=chance), *values])
    return "\n".join(align(lines, words=1))


def print_result(evaluation: Evaluation, folder: Path, *, recipe: str, full: bool) -> None:
    """Print the summary, the full table if wanted, and what the output folder contains."""
    titles = {"model": RECIPES[recipe], **{name: _title(name) for name in evaluation.references}}
    told = render(
        "demo.txt",
        evaluation=evaluation,
        titles=titles,
        summary=summary(evaluation, recipe),
        folder=folder,
        page=PAGE,
        full=full,
    )
    print(told)


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
    return RECIPES.get(reference.removesuffix(" recipe"), reference)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _spread(pairs: Drawings) -> list[int]:
    """Choose `PICTURES` drawings spread evenly over the set, of different concepts if possible."""
    first_of = {name: row for row, name in reversed(list(enumerate(pairs.names)))}
    return spread(sorted(first_of.values()), PICTURES)
