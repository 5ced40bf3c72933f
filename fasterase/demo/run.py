"""Run the demo: erase one concept through the public `unlearn`, and show what changed.

Its pairs are drawings of emoji with their names. They prove that the machinery works on real
image-text pairs; they say nothing about photographs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import fasterase
from fasterase.config import UnlearnConfig
from fasterase.demo import emoji
from fasterase.demo.sets import DemoSets, Drawings, build_sets
from fasterase.demo.show import RECIPE_TITLES, draw_sheet, print_result
from fasterase.errors import InputError
from fasterase.files import write_text
from fasterase.parallel.ranks import launched_rank
from fasterase.report.evaluation import Evaluation
from fasterase.report.plots import plot_history, require_matplotlib

# The paper's recipe has numbers to choose; `python -m benchmarks.recipes` chose these on its
# validation subgroups. Ours has none: the demo gives it nothing but batches for a small set.
CLIPERASE = {"lr": 1e-4, "consistency_weight": 9.0, "max_steps": 60}
BATCHES = {"batch_size": 128, "forget_batch_size": 32}
RECIPES = tuple(RECIPE_TITLES)


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


def forget_pairs(sets: DemoSets, recipe: str) -> Drawings:
    """Return the forget drawings with all wordings for fasterase, and names for the paper's."""
    return sets.forget if recipe == "fasterase" else sets.forget.reworded(emoji.name_only)


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

    Args:
        forget: a group or subgroup of emoji ("food-fruit"), or a regular expression on names.
        model: any model that `fasterase.unlearn` takes; None is the small CLIP of the package.
        recipe: "fasterase" or "cliperase" (the paper's); the other one runs for comparison.
        output_dir: folder of the results; None is `runs/demo-<forget>`, with `_` for characters
            that are not part of a word.
        full: also print the table of every metric.
        fields: further fields of `UnlearnConfig`.

    Returns:
        The evaluation. A summary of it is printed. The folder gets the whole of it, the erased
        model, the history, a loss plot and a sheet of pictures with captions before and after.
        None on all but the first of several processes, which erase together.

    Raises:
        InputError: an argument is not usable.
        MissingExtraError: matplotlib is not installed (extra `eval`).
    """
    require_matplotlib()  # now, not after minutes of erasing
    original = str(emoji.BASE_MODEL) if model is None else model
    folder = Path(output_dir or "runs/demo-" + re.sub(r"[^\w-]+", "_", forget))
    small_model = model is None
    configs = {
        name: recipe_config(name, small_model=small_model, **fields)
        for name in (recipe, *(other for other in RECIPES if other != recipe))
    }
    sets = build_sets(forget, original=original, seed=configs[recipe].seed)
    shown = ", ".join(sets.concepts[:6]) + (", ..." if len(sets.concepts) > 6 else "")
    print(f"Erasing {len(sets.concepts)} concepts ({shown}) from {original}.")
    print(
        f"{len(sets.forget)} drawings to forget, {len(sets.retain)} to retain, "
        f"{len(sets.holdout)} held out. Results go to {folder}."
    )
    results = {}
    for name, config in configs.items():
        config = config.replace(
            output_dir=str(folder if name == recipe else folder / name),
            reference_cache=str(folder / "reference"),
        )
        with _comparison(name) if name != recipe else nullcontext():
            results[name] = fasterase.unlearn(
                original, forget_pairs(sets, name), sets.retain, config=config
            )
    if launched_rank() != 0:
        return None
    references = {
        f"{name} recipe": str(folder / name / "model") for name in configs if name != recipe
    }
    if small_model and forget == emoji.DEFAULT_FORGET:
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
    if results[recipe].history:  # empty where the model never knew the concept
        plot_history(results[recipe].history, folder / "losses.png")
    draw_sheet(sets, original, folder / "model", folder / "pictures.png")
    print_result(evaluation, folder, recipe=recipe, full=full)
    return evaluation


@contextmanager
def _comparison(recipe: str) -> Iterator[None]:
    """Announce the run of the other recipe, and put its name before the warnings of the run."""
    title = RECIPE_TITLES[recipe]
    print(f"For comparison: {title}.")
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        for warning in caught:
            text = f"{title} (comparison): {warning.message}"
            warnings.warn(text, warning.category, stacklevel=2)
