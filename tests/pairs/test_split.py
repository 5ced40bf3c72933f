"""Splitting a set by classes, captions, callables and ids."""

from __future__ import annotations

import re

import pytest
import torch

from fasterase import split
from fasterase.errors import InputError
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import BrokenPair

TEXTS = ["a red apple", "pineapple", "APPLE", ["a pear", "an apple-like pear"], "sea lion"]


@pytest.fixture
def items():
    return [(torch.full((3, 2, 2), float(i)), text) for i, text in enumerate(TEXTS)]


@pytest.fixture
def classes(tmp_path, encoded):
    for number, name in enumerate(["apple", "pine_apple", "sea_lion"]):
        (tmp_path / "data" / name).mkdir(parents=True)
        for n in range(2):
            (tmp_path / "data" / name / f"{n}.png").write_bytes(encoded(10 * number + n))
    return tmp_path / "data"


def chosen(source, forget):
    part, rest = split(source, forget=forget)
    assert part.name == "forget"
    assert rest.name == "retain"
    base = open_pairs(source, name="source")
    assert sorted(part.indices.tolist() + rest.indices.tolist()) == list(range(len(base)))
    assert open_pairs(part, name="forget") is part
    return part.indices.tolist()


def test_expressions_search_captions_without_case(items):
    assert chosen(items, "apple") == [0, 1, 2, 3]
    assert chosen(items, r"\bapple\b") == [0, 2, 3]
    assert chosen(items, "^sea") == [4]
    assert chosen(items, re.compile("APPLE")) == [2]


def test_lists_are_whole_captions_where_there_are_no_classes(items):
    assert chosen(items, ["apple", "sea_lion"]) == [2, 4]
    assert chosen(items, ["A pear"]) == [3]


def test_classes_by_name(classes):
    assert chosen(classes, ["apple"]) == [0, 1]
    assert chosen(classes, "apple") == [0, 1]
    assert chosen(classes, ["pine_apple", "Sea Lion"]) == [2, 3, 4, 5]
    assert chosen(classes, "app") == [0, 1, 2, 3]
    with pytest.raises(InputError, match="no class 'pear'; the classes are apple, pine apple"):
        split(classes, forget=["apple", "pear"])


def test_callables_see_the_record_and_decode_only_if_they_look(items, classes):
    assert chosen(items, lambda record: record.image[0, 0, 0] == 3) == [3]
    assert chosen(items, lambda record: isinstance(record.text, list)) == [3]
    assert chosen(items, lambda record: record.id == "source[1]" and record.mask is None) == [1]
    for path in classes.rglob("*.png"):
        path.write_bytes(b"not decodable")
    assert chosen(classes, lambda record: record.meta["class"] == "apple") == [0, 1]


def test_files_of_ids(classes, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("apple/0.png\n\n sea_lion/1.png \n")
    assert chosen(classes, ids) == [0, 5]
    assert chosen(classes, str(ids)) == [0, 5]
    ids.write_text("1.png\n")
    assert chosen(classes, ids) == [1, 3, 5]
    ids.write_text("apple/0.png\nle/0.png\n")
    with pytest.raises(InputError, match=r"1 of the 2 ids .*'le/0\.png'.*'apple/0\.png'"):
        split(classes, forget=ids)
    with pytest.raises(InputError, match="cannot be read"):
        split(classes, forget=tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ("banana", "'banana' matches no pair of 5.*forget set would be empty"),
        (".", "matches every pair of 5.*retain set would be empty"),
        ("(", "not a regular expression"),
        ("ids.txt", "matches no pair.* no file of ids of that name"),
        (["banana"], "matches no pair of 5, so the forget set would be empty$"),
        ([], "`forget` must be class names"),
        (7, "`forget` must be class names.*found 7"),
        (lambda record: False, "matches no pair"),
    ],
)
def test_bad_rules(items, forget, message):
    with pytest.raises(InputError, match=message):
        split(items, forget=forget)


def test_token_ids_have_no_words(items):
    coded = [(image, torch.tensor([1, 2])) for image, _ in items]
    with pytest.raises(InputError, match="token ids"):
        split(coded, forget="apple")
    assert chosen(coded, lambda record: record.id == "source[2]") == [2]


def test_broken_pairs_stay_in_retain_to_be_skipped_there(items):
    part, rest = split([*items, (None, "apple"), (items[0][0], None)], forget="lion")
    assert len(part) == 1
    with pytest.raises(BrokenPair):
        rest[4]


def test_subsets_delegate(items):
    part, rest = split(items, forget="apple")
    assert part.texts(3) == ["a pear", "an apple-like pear"]
    assert rest.texts(0) == ["sea lion"]
    assert rest.id(0) == "source[4]"
    assert part.manifest() != rest.manifest()
    inner, _ = split(part, forget="pear")
    assert inner.indices.tolist() == [3]
    assert [record.id for record in inner] == ["source[3]"]
    with pytest.raises(IndexError):
        part[-1]


def test_keys_are_passed_on(items):
    rows = [{"img": image, "words": text} for image, text in items]
    part, _ = split(rows, forget="lion", image_key="img", text_key="words")
    assert part.texts(0) == ["sea lion"]
