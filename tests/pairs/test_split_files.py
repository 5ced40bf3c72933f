"""The files that a split is written to give the same pairs back."""

from __future__ import annotations

import json

import pandas
import pytest

from fasterase.errors import InputError
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.split import split, write_split

CAPTIONS = ["an apple", 'a "red" apple, cut', "a pear\nin two lines", "größe", "", "sea lion"]


@pytest.fixture
def table(pictures):
    rows = [
        {"filepath": f"{n}.png", "title": text, "source": f"s{n}", "image": "no.png"}
        for n, text in enumerate(CAPTIONS)
    ]
    pandas.DataFrame(rows).to_csv(pictures / "t.csv", index=False)
    return pictures / "t.csv"


def read(path):
    pairs = open_pairs(path, name="x")
    return [(pairs.id(i), pairs.texts(i), pairs.meta(i), pairs[i].image) for i in range(len(pairs))]


def test_tables_give_the_pairs_back(table, tmp_path):
    forget, retain = split(table, forget="apple", image_key="filepath")
    files = write_split(forget, retain, tmp_path / "sets")
    assert files == (tmp_path / "sets/forget.csv", tmp_path / "sets/retain.csv", True)
    found = read(files.forget)
    assert [texts for _, texts, *_ in found] == [["an apple"], ['a "red" apple, cut']]
    assert [id for id, *_ in found] == [str(table.parent / f"{n}.png") for n in (0, 1)]
    assert found[1][2] == {"source": "s1"}
    assert found[1][3].getpixel((0, 0))[0] == 1
    kept = open_pairs(files.retain, name="retain")
    assert kept.texts(0) == ["a pear\nin two lines"]
    assert kept.texts(1) == ["größe"]
    with pytest.raises(BrokenPair):
        kept.texts(2)
    assert kept.encoded_sizes().tolist() == retain.encoded_sizes().tolist()


def test_alternative_captions_need_json_lines(pictures, tmp_path):
    rows = [{"image": "0.png", "text": ["a", "b"], "score": 1.5}, {"image": "1.png", "text": "c"}]
    (pictures / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = write_split(*split(pictures / "t.jsonl", forget="c"), tmp_path)
    assert (files.forget.name, files.retain.name) == ("forget.jsonl", "retain.jsonl")
    ((id, texts, meta, _),) = read(files.retain)
    assert (id, texts, meta) == (str(pictures / "0.png"), ["a", "b"], {"score": 1.5})


def test_classes_stay_in_meta(tmp_path, encoded):
    for name in ("apple", "sea_lion"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.png").write_bytes(encoded(1))
    files = write_split(*split(tmp_path / "data", forget=["apple"]), tmp_path)
    ((_, texts, meta, _),) = read(files.retain)
    assert (texts, meta) == (["sea lion"], {"class": "sea lion"})


def test_tars_give_lists_of_ids(make_tar, encoded, tmp_path):
    entries = {f"k{n}.png": encoded(n) for n in range(3)}
    entries |= {f"k{n}.txt": "apple" if n else "pear" for n in range(3)}
    shard = make_tar("a.tar", dict(sorted(entries.items())))
    forget, retain = split(shard, forget="apple")
    files = write_split(forget, retain, tmp_path)
    assert (files.forget.name, files.tables) == ("forget.txt", False)
    assert files.retain.read_text() == "a.tar/k0\n"
    again, rest = split(shard, forget=files.forget)
    assert again.indices.tolist() == forget.indices.tolist()
    assert rest.indices.tolist() == retain.indices.tolist()


def test_ids_that_repeat_are_refused(make_tar, encoded, tmp_path):
    shards = []
    for folder, text in (("x", "apple"), ("y", "pear")):
        (tmp_path / folder).mkdir()
        shards.append(make_tar(f"{folder}/a.tar", {"k.png": encoded(1), "k.txt": text}))
    with pytest.raises(InputError, match=r"'a\.tar/k' belongs to pairs in both parts"):
        write_split(*split(shards, forget="apple"), tmp_path / "sets")
    assert not (tmp_path / "sets").exists()
