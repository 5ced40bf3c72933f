"""What does erasing one concept cost the pictures that are in neither set?

    python -m benchmarks.outside [--concepts "guide dog" "fire engine"] [--retain 100 all]

Erases single concepts of two drawings from the demo's model, beside few random pairs to keep and
beside all, with all defaults. Measured are all drawings in neither set: how many of them still find
their own name among all names, those that share a word with the erased name apart. --work keeps
measurements, so an interrupted command resumes. Writes outside.csv, a row per erasure with what was
hurt most, to --output, and prints the means, and the worst erasure of each size of the retain set.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fasterase
from benchmarks.command import comparison_parser, exit_with
from benchmarks.processes import call_all
from benchmarks.result_files import device_name, group_rows, keep_json, markdown_table, write_csv
from fasterase.demo import emoji
from fasterase.demo.sets import Drawings, open_teams
from fasterase.errors import InputError
from fasterase.pairs.table import PairTable
from fasterase.vocabulary import words_of

CONCEPTS = (
    *("guide dog", "fire engine", "hot springs", "snow-capped mountain", "octopus"),
    *("red apple", "police car light", "birthday cake", "tennis", "umbrella"),
)
SIZES = ("100", "150", "300", "all")
SHARING, OTHERS = "sharing a word", "all others"
COLUMNS = ("retain", "erasures", "forgotten", f"lost, {SHARING}", "worst", OTHERS, "worst")
RECALL = "image_to_text_recall@1"


@dataclass(frozen=True)
class Cell:
    """One erasure."""

    concept: str
    retain: str  # number of pairs, or "all"
    seed: int  # of the run and of the choice of pairs

    @property
    def file_name(self) -> str:
        return f"{self.concept.replace(' ', '-')}_{self.retain}_{self.seed}.json"


def split_drawings(cell: Cell, source: PairTable) -> dict[str, Drawings]:
    """Return the sets of an erasure by name, those in neither set too; empty ones are left out."""
    metas = [source.meta(row) for row in range(len(source))]
    rows = np.array([row for row, meta in enumerate(metas) if meta["member"]])
    names = np.array([metas[row]["concept"] for row in rows])
    others = np.flatnonzero(names != cell.concept)
    order = np.random.default_rng(cell.seed).permutation(others)
    kept = order if cell.retain == "all" else order[: int(cell.retain)]
    words = set(words_of(cell.concept))
    # A drawing of a kept name is no outsider.
    outside = others[~np.isin(names[others], names[kept])]
    shares = np.array([bool(words & set(words_of(name))) for name in names[outside]], bool)
    chosen = {
        "forget": np.flatnonzero(names == cell.concept),
        "retain": np.sort(kept),
        SHARING: outside[shares],
        OTHERS: outside[~shares],
    }
    return {
        name: Drawings(
            source,
            rows[places].tolist(),
            emoji.captions if name in ("forget", "retain") else emoji.name_only,
        )
        for name, places in chosen.items()
        if len(places)
    }


def run(cell: Cell, work: Path) -> dict[str, Any]:
    """Return the row of an erasure, made now or by an earlier command."""
    row: dict[str, Any] = keep_json(work / cell.file_name, lambda: _erase(cell))
    return row


def _erase(cell: Cell) -> dict[str, Any]:
    sets = split_drawings(cell, open_teams(emoji.TRAIN_TEAMS))
    forget, retain = sets.pop("forget"), sets.pop("retain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = fasterase.unlearn(
            str(emoji.BASE_MODEL),
            forget,
            retain,
            sets=sets,
            seed=cell.seed,
            evaluation="full",
            progress=False,
        )
    evaluation = result.evaluation
    assert evaluation is not None
    assert evaluation.original is not None
    row = {**asdict(cell), "cpu": device_name("cpu"), "verdict": result.verdict}
    row |= {"steps": len(result.history), "seconds": round(result.seconds, 1)}
    for name in sets:
        row |= {
            f"{name}, pairs": evaluation.pairs[name],
            f"{name}, before": evaluation.original[name][RECALL],
            f"{name}, after": evaluation.scores[name][RECALL],
        }
    return {**row, "hurt most": "; ".join(hurt.describe() for hurt in evaluation.hurt[:5])}


def lost(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Return the points of recall@1 that a set lost, of the rows that have such pairs."""
    return [
        100 * (row[f"{name}, before"] - row[f"{name}, after"])
        for row in rows
        if f"{name}, after" in row
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line of Markdown per size of the retain set."""
    lines = []
    for (size,), those in group_rows(rows, "retain").items():
        cells = [size, str(len(those)), str(sum(row["verdict"] == "forgotten" for row in those))]
        for name in (SHARING, OTHERS):
            found = lost(those, name)
            cells += [f"{np.mean(found):.1f}", f"{max(found):.1f}"] if found else ["-", "-"]
        lines.append(cells)
    return markdown_table(COLUMNS, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, and write and print the results."""
    parser = comparison_parser(__doc__, work="runs/outside", seeds=3)
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS, metavar="NAME")
    parser.add_argument("--retain", nargs="+", default=SIZES, metavar="PAIRS", help="or all")
    options = parser.parse_args(arguments)
    source = open_teams(emoji.TRAIN_TEAMS)
    metas = (source.meta(row) for row in range(len(source)))
    known = {meta["concept"] for meta in metas if meta["member"]}
    for name in options.concepts:
        if name not in known:
            raise InputError(f"--concepts: the model was not trained on {name!r}.")
    for size in options.retain:
        if size != "all" and not (size.isdecimal() and int(size)):
            raise InputError(f"--retain {size}: give a number of pairs, or all.")
    cells = [
        Cell(concept, size, seed)
        for size in options.retain
        for seed in range(options.seeds)
        for concept in options.concepts
    ]
    found = call_all(run, cells, options.work, processes=options.processes)
    rows = [found[cell] for cell in cells]
    write_csv(options.output / "outside.csv", rows, decimals=4)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    exit_with(main)
