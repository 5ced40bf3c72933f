"""What `fasterase.find` finds of a concept, beside a regular expression over the captions.

The corpus: the demo's drawings by two teams that its model was trained on, and by a third one that
no model has seen. Each caption is the drawing's name and a keyword. Half of those of the concept
lose the name, and a quarter as many others get one in passing.

    python -m benchmarks.find [--subgroups food-fruit ...] [--seeds 3] [--work runs/find]

Writes find.csv, a row for each concept, seed and way to find it, and prints the means over concepts
and seeds, and over seeds.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import fasterase
from benchmarks.command import TEST, exit_with, new_parser
from benchmarks.result_files import RESULTS, group_table, write_csv
from fasterase.demo import emoji
from fasterase.finder.decisions import Decision
from fasterase.finder.found import Found

PRECISION = 0.95  # aimed at
NEAREST = 0.1  # share of the corpus
# Heading of the printed tables -> column.
COLUMNS = {
    "precision": "precision",
    "recall": "recall",
    "precision, known teams": "precision_known",
    "recall, known teams": "recall_known",
    "recall, unseen team": "recall_unseen",
    "unsure pairs": "unsure",
    "unsure, of the nearest tenth": "unsure_of_nearest",
}


class Corpus:
    """The drawings as files, and for each concept and seed a table of captions."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.records: list[emoji.EmojiInfo] = []
        folder.mkdir(parents=True, exist_ok=True)
        for team in emoji.TEAMS:
            for record, png in emoji.samples(team):
                self.records.append(record)
                file = folder / self._file(record)
                if not file.exists():
                    file.write_bytes(png)
        self.is_known = np.array([each["team"] in emoji.TRAIN_TEAMS for each in self.records])

    @staticmethod
    def _file(record: emoji.EmojiInfo) -> str:
        return f"{record['team']}-{record['hexcode']}.png"

    def of(self, subgroup: str) -> np.ndarray:
        """Return which drawings belong to a concept, [n] bool."""
        return np.array([each["subgroup"] == subgroup for each in self.records])

    def names(self, subgroup: str) -> list[str]:
        """Return the names of a concept."""
        return sorted({each["concept"] for each in self.records if each["subgroup"] == subgroup})

    def write(self, subgroup: str, seed: int) -> Path:
        """Write the table of captions, and return its path."""
        random, shows = np.random.default_rng(seed), self.of(subgroup)
        rows = random.permutation(np.flatnonzero(shows))
        nameless = set(rows[: len(rows) // 2].tolist())
        passing = random.permutation(np.flatnonzero(~shows))[: len(rows) // 4].tolist()
        names = self.names(subgroup)
        hidden = name_expression(names)
        path = self._folder / f"{subgroup}-{seed}.csv"
        table = []
        for row, record in enumerate(self.records):
            words = [record["concept"], *record["keywords"]]
            if row in nameless:
                words = [word for word in words if not hidden.search(word)]
            text = ", ".join(dict.fromkeys(words[:2])) or "something"
            if row in passing:
                text += f" beside {random.choice(names)}"
            table.append({"filepath": self._file(record), "title": f"a picture of {text}"})
        write_csv(path, table)
        return path


def name_expression(names: Sequence[str]) -> re.Pattern[str]:
    """Return what a user would write to find the names in captions."""
    return re.compile(rf"\b({'|'.join(map(re.escape, names))})s?\b", re.IGNORECASE)


def measure(corpus: Corpus, subgroup: str, seed: int, cache: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each way to find a concept."""
    table, names, shows = corpus.write(subgroup, seed), corpus.names(subgroup), corpus.of(subgroup)
    about = {"concept": subgroup, "seed": seed, "pairs": int(shows.sum())}
    options: dict[str, Any] = {"reference_cache": cache, "seed": seed, "progress": False}
    found = fasterase.find(str(emoji.BASE_MODEL), table, names, **options)
    alone = fasterase.find(str(emoji.BASE_MODEL), table, names, picture_alone=True, **options)
    forget, _ = fasterase.split(table, forget=name_expression(names))
    by_expression = np.zeros(len(shows), bool)
    by_expression[forget.base_rows(np.arange(len(forget)))] = True
    nobody = np.zeros(len(shows), bool)
    unsure = found.codes == Decision.UNSURE
    ways = {
        "regular expression": (by_expression, nobody),
        "find": (to_forget(found), unsure),
        "find, then a person decides": (to_forget(found) | (unsure & shows), nobody),
        "find, picture_alone": (to_forget(alone), alone.codes == Decision.UNSURE),
        "best threshold on pictures": (best_threshold(found.scores, shows), nobody),
    }
    nearest = np.argsort(-found.scores)[: int(NEAREST * len(shows))]
    for way, (chosen, doubted) in ways.items():
        yield {
            **about,
            "way": way,
            "chosen": int(chosen.sum()),
            "precision": share(shows, chosen),
            "recall": share(chosen, shows),
            "precision_known": share(shows, chosen & corpus.is_known),
            "recall_known": share(chosen, shows & corpus.is_known),
            "recall_unseen": share(chosen, shows & ~corpus.is_known),
            "unsure": int(doubted.sum()),
            "unsure_of_nearest": float(doubted[nearest].mean()),
        }


def to_forget(found: Found) -> np.ndarray:
    """Return the pairs to forget, unseen ones too, [n] bool."""
    return found.codes >= Decision.FORGET


def best_threshold(scores: np.ndarray, shows: np.ndarray) -> np.ndarray:
    """Return the most pictures above any threshold that knows the truth, at `PRECISION`."""
    order = np.argsort(-scores)
    precise = np.cumsum(shows[order]) / np.arange(1, len(order) + 1) >= PRECISION
    chosen = np.zeros(len(scores), bool)
    chosen[order[: np.flatnonzero(precise)[-1] + 1 if precise.any() else 0]] = True
    return chosen


def share(counted: np.ndarray, among: np.ndarray) -> float:
    """Return the share of `among` that is `counted`, both [n] bool."""
    return float(counted[among].mean()) if among.any() else 0.0


def means(rows: Sequence[dict[str, Any]], by: str) -> str:
    """Return a table of the means, a line for each value of the column `by`."""

    def mean(those: list[dict[str, Any]], title: str) -> str:
        return f"{fmean(row[COLUMNS[title]] for row in those):.2f}"

    return group_table(rows, [by], [*COLUMNS], mean)


def main() -> None:
    """Measure all concepts, and write and print the results."""
    parser = new_parser(__doc__)
    parser.add_argument("--subgroups", nargs="+", default=TEST, metavar="SUBGROUP")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--work", type=Path, default=Path("runs/find"), help="pictures, features")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "find ")  # what a small corpus lacks
    corpus = Corpus(options.work)
    rows = [
        row
        for subgroup in options.subgroups
        for seed in range(options.seeds)
        for row in measure(corpus, subgroup, seed, options.work / "features")
    ]
    write_csv(options.output / "find.csv", rows, decimals=4)
    print(means(rows, "way"))
    for way in ("find", "find, picture_alone"):
        print(f"{way}:\n\n{means([row for row in rows if row['way'] == way], 'concept')}")


if __name__ == "__main__":
    exit_with(main)
