"""Measure what a model knows of pairs that it should have forgotten, beside the original.

Forget and retain alone flatter a method. This measures two more sets: unseen pictures of the same
things, which must be forgotten too, and similar things, which must not.

    python examples/measure_forgetting.py --report report.md

It measures a small CLIP that was trained without fruit against one that was trained with it. For
your own models, replace the folders and the sets.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from typing import Any

import fasterase

DEMO = files("fasterase.demo")
SEEN = str(DEMO / "data" / "noto-*.tar")  # drawings that the models were trained on
UNSEEN = str(DEMO / "data" / "twemoji-*.tar")  # the same things, drawn by others


def is_fruit(record: Any) -> bool:
    """Tell whether a pair shows fruit; `meta` is the json entry of its WebDataset sample."""
    return record.meta["subgroup"] == "food-fruit"


def is_other_food(record: Any) -> bool:
    """Tell whether a pair shows food other than fruit."""
    return record.meta["group"] == "food-drink" and not is_fruit(record)


def main(arguments: list[str] | None = None) -> fasterase.Evaluation:
    """Measure both models on all sets, print the table, write a report if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEMO / "models" / "without-food-fruit"))
    parser.add_argument("--original", default=str(DEMO / "models" / "base"))
    parser.add_argument("--max_pairs", type=int, default=1000, help="pairs measured per set")
    parser.add_argument("--report", help="Markdown or JSON file to write")
    options = parser.parse_args(arguments)

    forget, retain = fasterase.split(SEEN, forget=is_fruit)
    unseen, _ = fasterase.split(UNSEEN, forget=is_fruit)
    neighbours, _ = fasterase.split(SEEN, forget=is_other_food)
    evaluation = fasterase.evaluate(
        options.model,
        forget,
        retain,
        sets={"neighbour": neighbours},
        forget_sets={"unseen": unseen},
        original=options.original,
        max_pairs=options.max_pairs,
    )
    print(evaluation.table())
    if options.report:
        print(f"written to {evaluation.report(options.report)}")
    return evaluation


if __name__ == "__main__":
    main()
