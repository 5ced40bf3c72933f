"""Split pairs by classes, captions, hashes, callables and ids; written splits are read back."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Sequence

import numpy as np
import pandas
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader
from torch.utils.data import Subset as TorchSubset

from fasterase import split
from fasterase.errors import InputError
from fasterase.pairs.open import open_pairs
from fasterase.pairs.prepare import caption_key, hash_captions
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.split import read_decisions, write_split
from tests.pairs.reading import contents, encoded, samples

TEXTS = ["a red apple", "pineapple", "APPLE", ["a pear", "an apple-like pear"], "sea lion"]


@pytest.fixture
def items():
    return [(torch.full((3, 2, 2), float(i)), text) for i, text in enumerate(TEXTS)]


@pytest.fixture
def classes(tmp_path):
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
    rows = [{"img": image, "words": text} for image, text in items]
    assert split(rows, forget="lion", image_key="img", text_key="words")[0].texts(0) == ["sea lion"]
    assert chosen(items, "apple") == [0, 1, 2, 3]
    assert chosen(items, r"\bapple\b") == [0, 2, 3]
    assert chosen(items, "^sea") == [4]
    assert chosen(items, re.compile("APPLE")) == [2]
    assert chosen(items, "|".join(["lion", *(f"word{n}" for n in range(60))])) == [4], (
        "no file name"
    )


def test_lists_are_whole_captions_where_there_are_no_classes(items):
    assert chosen(items, ["apple", "sea_lion"]) == [2, 4]
    assert chosen(items, ["A pear"]) == [3]
    with pytest.raises(InputError, match="'lemon' is no caption of the 5 pairs"):
        split(items, forget=["apple", "lemon"])


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


def test_a_rule_that_cannot_read_a_pair_leaves_it_in_retain(items):
    assert chosen([*items, (items[0][0], "")], lambda record: "lion" in record.text) == [4]


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
    (classes / "apple" / "sea_lion").mkdir()
    (classes / "apple" / "sea_lion" / "0.png").write_bytes(encoded(1))
    ids.write_text("sea_lion/0.png\n")
    assert split(classes, forget=ids)[0].id(0) == "sea_lion/0.png"  # no id that ends so


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


def test_results_are_sequences_of_pairs(items):
    part, rest = split(items, forget="apple")
    assert isinstance(part, Sequence)
    assert (part.texts(3), rest.texts(0)) == (["a pear", "an apple-like pear"], ["sea lion"])
    assert part.digest() != rest.digest()
    image, text = part[np.int64(2)]
    assert torch.equal(image, items[2][0])
    assert text == items[2][1]
    assert part[-1].id == "source[3]"
    assert [record.id for record in part] == [f"source[{i}]" for i in range(4)]
    assert [record.id for record in reversed(part)] == [f"source[{i}]" for i in (3, 2, 1, 0)]
    for index in (len(part), -len(part) - 1):
        with pytest.raises(IndexError):
            part[index]


def test_views_of_results(items):
    part, _ = split(items, forget="apple")
    inner, _ = split(part, forget="pear")
    assert inner.indices.tolist() == [3]
    assert [record.id for record in inner] == ["source[3]"]
    view = part[::-2]
    assert [record.id for record in view] == ["source[3]", "source[1]"]
    assert open_pairs(view, name="forget") is view
    with pytest.raises(InputError, match="`forget` is empty"):
        open_pairs(part[2:2], name="forget")


def test_records_are_pairs_that_survive_pickling(items):
    part, _ = split(items, forget="lion")
    record = pickle.loads(pickle.dumps(part[0]))
    assert torch.equal(record.image, part[0].image)
    assert (record.text, record.id, record.mask, record.meta) == ("sea lion", "source[4]", None, {})


def test_torch_subsets_and_loaders_of_results_are_read(items):
    part, _ = split(items, forget="apple")
    chosen = TorchSubset(TorchSubset(part, [3, 1, 0]), [0, 2])
    for source in (chosen, DataLoader(chosen, batch_size=2, shuffle=True)):
        pairs = open_pairs(source, name="retain")
        assert [pairs.id(i) for i in range(len(pairs))] == ["source[3]", "source[0]"]
    images, texts = next(iter(DataLoader(part[:2], batch_size=2)))
    assert torch.equal(images, torch.stack([items[0][0], items[1][0]]))
    assert list(texts) == [items[0][1], items[1][1]]
    joined = open_pairs(ConcatDataset([part, part[:1]]), name="x")
    assert joined[4].text == items[0][1]


def test_results_say_what_they_are(items, classes):
    part, rest = split(classes, forget=["apple"])
    assert repr(part) == "forget pairs: 2 of 6 of data"
    assert repr(rest[1:]) == "retain pairs: 3 of 6 of data"
    assert repr(split(items, forget="lion")[0]) == "forget pairs: 1 of 5 of a list"
    assert repr(open_pairs(items * 300, name="retain")) == "retain pairs: 1,500 of a list"


def test_caption_hashes(items):
    assert chosen(items, hash_captions(["an apple-like pear", "a red apple"])) == [0, 3]
    coded = [(items[0][0], torch.tensor([n, 2, 0])) for n in range(3)]
    assert chosen(coded, hash_captions([caption_key(torch.tensor([1, 2]))])) == [1]
    with pytest.raises(InputError, match="1 of the 2 caption hashes belong to no pair"):
        split(items, forget=hash_captions(["a red apple", "A red apple"]))


def test_passes_over_views_and_shards_give_what_single_rows_give(make_tar):
    entries = {"b/2.png": encoded(1)}
    for number in range(40):
        entries |= {f"k{number}.png": encoded(number)}
        if number % 7:
            entries |= {f"k{number}.txt": f"caption {number % 5}"}
    pairs = open_pairs(make_tar("s.tar", entries), name="x")
    rows = [list(range(1, 39, 2)), [30, 2], [5, 5, *range(20)]]
    for source in (pairs, *(pairs.select(each) for each in rows)):
        indices = range(len(source))
        assert list(source.every_id()) == [source.id(i) for i in indices]
        for texts, i in zip(source.every_text(), indices, strict=True):
            if texts:
                assert texts == source.texts(i)
            else:
                with pytest.raises(BrokenPair):
                    source.texts(i)


WRITTEN = ["an apple", 'a "red" apple, cut', "a pear\nin two lines", "größe", "", "sea lion"]


@pytest.fixture
def table(pictures):
    rows = [
        {"filepath": f"{n}.png", "title": text, "source": f"s{n}", "image": "no.png"}
        for n, text in enumerate(WRITTEN)
    ]
    pandas.DataFrame(rows).to_csv(pictures / "t.csv", index=False)
    return pictures / "t.csv"


def test_tables_give_the_pairs_back(table, tmp_path):
    forget, retain = split(table, forget="apple", image_key="filepath")
    files = write_split(forget, retain, tmp_path / "sets")
    assert files == (tmp_path / "sets/forget.csv", tmp_path / "sets/retain.csv", True)
    found = contents(files.forget)
    assert [texts for _, texts, *_ in found] == [["an apple"], ['a "red" apple, cut']]
    assert [id for id, *_ in found] == [str(table.parent / f"{n}.png") for n in (0, 1)]
    assert found[1][2] == {"source": "s1"}
    assert found[1][3] == encoded(1)
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
    ((*stored, _),) = contents(files.retain)
    assert stored == [str(pictures / "0.png"), ["a", "b"], {"score": 1.5}]


def test_what_is_no_text_needs_json_lines(pictures, tmp_path):
    odd = pictures / os.fsdecode(b"caf\xe9.png")
    odd.write_bytes(encoded(7))
    rows = [
        {"image": odd.name, "text": "apple"},
        {"image": "0.png", "text": "pear", "alt": "\ud83d"},
    ]
    (pictures / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = write_split(*split(pictures / "t.jsonl", forget="apple"), tmp_path / "sets")
    assert (files.forget.name, files.retain.name) == ("forget.jsonl", "retain.jsonl")
    assert sorted(file.name for file in files.forget.parent.iterdir()) == [
        "forget.jsonl",
        "retain.jsonl",
    ]
    assert [(id, texts) for id, texts, *_ in contents(files.forget)] == [(str(odd), ["apple"])]
    assert contents(files.retain)[0][2] == {"alt": "\ud83d"}


def test_tars_give_lists_of_ids(make_tar, tmp_path):
    shard = make_tar("a.tar", samples({0: "pear", 1: "apple", 2: "apple"}))
    forget, retain = split(shard, forget="apple")
    files = write_split(forget, retain, tmp_path)
    assert (files.forget.name, files.tables) == ("forget.txt", False)
    assert files.retain.read_text() == "a.tar/k0\n"
    again, rest = split(shard, forget=files.forget)
    assert again.indices.tolist() == forget.indices.tolist()
    assert rest.indices.tolist() == retain.indices.tolist()


def test_decisions_leave_what_is_unsure_out_of_both_sets(table, tmp_path):
    file = tmp_path / "decisions.csv"
    ids = [open_pairs(table, name="x", image_key="filepath").id(i) for i in range(3)]
    file.write_text(f'\ufeffid,decision\r\n"{ids[0]}",forget\r\n{ids[1]},unsure\r\n')
    forget, retain = split(table, forget=str(file), image_key="filepath")
    assert forget.indices.tolist() == [0]
    assert retain.indices.tolist() == [*range(2, len(forget.base))]
    # Of two decisions on one id, as of a picture with several captions, the stronger one counts.
    file.write_text(f"id,decision\n{ids[0]},retain\n{ids[0]},unsure\n{ids[0]},forget\n")
    pairs = open_pairs(table, name="x", image_key="filepath")
    decided = read_decisions(pairs, file)
    assert [decided[name].sum() for name in ("forget", "unsure", "retain")] == [1, 0, 0]
    file.write_text("id,decision\n")
    with pytest.raises(InputError, match="matches no pair"):
        split(table, forget=file, image_key="filepath")


def test_ids_that_repeat_are_refused(make_tar, tmp_path):
    shards = []
    for folder, text in (("x", "apple"), ("y", "pear")):
        (tmp_path / folder).mkdir()
        shards.append(make_tar(f"{folder}/a.tar", {"k.png": encoded(1), "k.txt": text}))
    with pytest.raises(InputError, match=r"'a\.tar/k' belongs to pairs in both parts"):
        write_split(*split(shards, forget="apple"), tmp_path / "sets")
    assert not (tmp_path / "sets").exists()
