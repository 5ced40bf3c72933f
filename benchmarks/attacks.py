"""Attack models that forgot a subgroup of the demo's emoji: does the concept come back?

    python -m benchmarks.attacks [--erased NAME=FOLDER ...]

Runs every attack on the demo's model, which knows all emoji, and on the one that was trained
without food-fruit: the levels of a model that knows and of one that never knew, which an erased
model is to be compared with. --erased adds models that forgot food-fruit, such as
`--erased demo=runs/demo-food-fruit/model` after `fasterase demo`. Writes attacks.csv to --output,
one row per attack, figure and model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fasterase
from benchmarks.result_files import RESULTS, code_version, device_name, write_csv
from fasterase.demo import emoji
from fasterase.demo.sets import Drawings, build_sets, open_teams
from fasterase.errors import InputError
from fasterase.evaluation.attacks.attacker import ATTACKS
from fasterase.evaluation.evaluation import Evaluation

RETRAINED = "retrained without it"


def non_members() -> Drawings:
    """Return the training teams' drawings of the concepts that neither model was trained on."""
    trained = open_teams(emoji.TRAIN_TEAMS)
    records = (trained.meta(row) for row in range(len(trained)))
    return Drawings.of(trained, {each["concept"] for each in records if not each["member"]})


def rows_of(evaluation: Evaluation, model: str, **given: Any) -> Iterator[dict[str, Any]]:
    """Yield a row per attack and figure: of the model with its interval, and of the original."""
    for attack, figures in evaluation.attacks.items():
        for figure in figures.values():
            yield {
                "attack": attack,
                "figure": figure.key,
                "wanted": figure.wanted,
                "model": model,
                "value": figure.value,
                "low": figure.low,
                "high": figure.high,
                "original": figure.original,
                "chance": figure.chance,
                **given,
            }


def parse_models(entries: Sequence[str]) -> dict[str, str]:
    """Read NAME=FOLDER entries."""
    models = {}
    for entry in entries:
        name, _, folder = entry.partition("=")
        if not (name and folder) or name == RETRAINED:
            raise InputError(f"--erased {entry}: expected NAME=FOLDER of a model.")
        models[name] = folder
    return models


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--erased", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--max_pairs", type=int, default=5000, help="pairs measured per set")
    parser.add_argument("--plots", type=Path, help="also draw the attacks on each model here")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)

    models = {RETRAINED: str(emoji.RETRAINED_MODEL), **parse_models(options.erased)}
    sets = build_sets(emoji.DEFAULT_FORGET, original=str(emoji.BASE_MODEL), seed=0)
    strangers = non_members()
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        evaluation = fasterase.evaluate(
            model,
            sets.forget,
            sets.retain,
            forget_sets={"forget-unseen": sets.unseen},
            original=str(emoji.BASE_MODEL),
            attacks=tuple(ATTACKS),
            non_members=strangers,
            max_pairs=options.max_pairs,
            device="cpu",
            progress=False,
        )
        print(f"{name}\n{evaluation.table()}\n", flush=True)
        if options.plots is not None:
            evaluation.plot(options.plots / name.replace(" ", "-"))
        rows += rows_of(evaluation, name, device=device_name("cpu"), code=code_version())
    write_csv(options.output / "attacks.csv", rows)


if __name__ == "__main__":
    main()
