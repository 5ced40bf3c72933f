"""Draw the README's picture: some pictures with the model's closest name before and after erasing.

    fasterase demo --output_dir runs/demo-food-fruit
    python -m tools.readme_picture --run runs/demo-food-fruit

Takes the erased model from the output folder of the default demo.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.command import new_parser
from fasterase.demo import emoji
from fasterase.demo.run import rank_names
from fasterase.demo.sets import Drawings, build_sets
from fasterase.pairs.open import open_pairs
from fasterase.report.pictures import picture_sheet

FORGOTTEN = ("pineapple", "grapes", "red apple", "watermelon")
KEPT = ("hamburger", "ear of corn", "rose", "lion")
OUTPUT = Path(__file__).parents[1] / "docs" / "images" / "before_after.png"
# Pixels of each column of captions: the sheet stays below the width of a GitHub page.
TEXT_WIDTH = 140


def draw(run: Path, output: Path) -> Path:
    """Draw `FORGOTTEN` and `KEPT` by the base model and by the model in `run`; return the file."""
    sets = build_sets(emoji.DEFAULT_FORGET, original=str(emoji.BASE_MODEL), seed=0)
    ranking = rank_names(sets, str(emoji.BASE_MODEL), run / "model")
    sections = (
        ("Erased: fruit", sets.forget, FORGOTTEN),
        ("Kept: similar concepts", sets.neighbour, KEPT),
    )
    rows = [
        row
        for title, pairs, concepts in sections
        for row in ranking.rows(
            title, open_pairs(pairs, name=title), _first_drawings(pairs, concepts), 1
        )
    ]
    return picture_sheet(rows, output, erased=sets.concepts, text_width=TEXT_WIDTH)


def _first_drawings(pairs: Drawings, concepts: tuple[str, ...]) -> list[int]:
    return [pairs.names.index(concept) for concept in concepts]


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture and print its path."""
    parser = new_parser(__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo-food-fruit"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    print(draw(options.run, options.output))


if __name__ == "__main__":
    main()
