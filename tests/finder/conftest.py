"""A small corpus of drawings: some captions leave the name out, some name it in passing."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import fasterase
from fasterase.demo import emoji
from fasterase.finder.found import Found

NAMES = ("grapes", "melon", "watermelon", "lemon", "banana", "pineapple", "mango", "strawberry")
NAMELESS = ("grapes", "lemon")  # by one of the teams
IN_PASSING = ("bus", "drum", "fox")
HOSTILE = '<img src=x onerror=alert(1)>, "{{rest}}"'


def make_corpus(folder: Path) -> Path:
    """Write 7 % of the drawings by the teams that the demo's model knows, and their table."""
    folder.mkdir(exist_ok=True)
    rows = []
    for team in emoji.TRAIN_TEAMS:
        for number, (record, png) in enumerate(emoji.samples(team)):
            name = record["concept"]
            wanted = number % 14 == 0 or name in (*NAMES, *IN_PASSING)
            if not (record["member"] and wanted):
                continue
            file, title = f"{team} {record['hexcode']}.png", f"a picture of {name}"
            if name in NAMELESS and team == "fluent":
                title = "a picture"
            elif name in IN_PASSING and team == "noto":
                title = f"{name} and MELON"
            elif name == "fox" and team == "fluent":
                title = HOSTILE
            (folder / file).write_bytes(png)
            rows.append([file, title])
    with (folder / "corpus.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([["filepath", "title"], *rows])
    return folder / "corpus.csv"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "drawings")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of the corpus, once it was looked through."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def found(corpus: Path, cache: Path) -> Found:
    return look(corpus, cache)


def look(corpus: Path, cache: Path, **options: object) -> Found:
    return fasterase.find(
        str(emoji.BASE_MODEL), corpus, NAMES, reference_cache=cache, progress=False, **options
    )
