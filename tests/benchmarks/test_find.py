"""The benchmark of `fasterase.find`: what it hides, what it counts, and its rows."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks import find
from fasterase.demo import emoji

SUBGROUPS = ("food-fruit", "animal-marine", "sky-weather", "tool")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> find.Corpus:
    """The drawings of four subgroups."""
    every = emoji.samples

    def some(team):
        return (each for each in every(team) if each[0]["subgroup"] in SUBGROUPS)

    monkeypatch.setattr(emoji, "samples", some)
    return find.Corpus(tmp_path)


def test_half_of_the_names_are_hidden_and_some_are_in_passing(corpus):
    shows, expression = corpus.of("food-fruit"), find.name_expression(corpus.names("food-fruit"))
    with corpus.write("food-fruit", 0).open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    named = np.array([bool(expression.search(text)) for _, text in rows])
    assert shows.sum() == 57
    assert named[shows].sum() == 57 - 28
    passing = [text for (_, text), shown in zip(rows, shows, strict=True) if not shown]
    assert sum(" beside " in text for text in passing) == 14


def test_the_best_threshold_is_as_far_down_as_the_precision_allows():
    shows = np.array([True] * 19 + [False, False] + [True])
    chosen = find.best_threshold(-np.arange(22.0), shows)
    assert chosen.tolist() == [True] * 20 + [False] * 2
    assert not find.best_threshold(np.arange(3.0), np.array([True, True, False])).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:find ")
def test_a_row_for_each_way(corpus, tmp_path):
    rows = list(find.measure(corpus, "food-fruit", 0, tmp_path / "features"))
    found = {row["way"]: row for row in rows}
    assert found["regular expression"]["recall"] == pytest.approx(29 / 57)
    assert found["regular expression"]["precision"] == pytest.approx(29 / (29 + 14), abs=0.05)
    assert found["find"]["precision"] > 0.85
    assert found["find, picture_alone"]["recall_known"] > 0.8
    assert found["find, then a person decides"]["recall_known"] > 0.9
    assert 0 < found["find, picture_alone"]["unsure"] < found["find"]["unsure"]
    assert find.means(rows, "way").count("\n") == 2 + len(rows)
    assert "| food-fruit | " in find.means(rows, "concept")
